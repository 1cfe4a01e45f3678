"""`vllm-mlx launch` and `vllm-mlx connect`: coding agents on a local model, without touching their global config."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vllm_mlx.cli.client import Ask, Client, Setup, Target, no_answer, set_up
from vllm_mlx.cli.clients import find_client
from vllm_mlx.cli.own_server import OwnServer
from vllm_mlx.cli.target import NoServer, base_url, find_target, own_url
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError

_SIGNALLED = 128
"""Exit code of a command that a signal ended, less the signal's number, as shells say it."""
_ASK_S = 20.0
_CONNECT_FOLDER = "vllm-mlx-clients"


def launch(config: Config, *, client: str, url: str | None, has_model: bool, arguments: Sequence[str]) -> int:
    """Run a client on a server that answers at `url`, or at the configured address, or is started for it.

    Returns the client's exit code. Raises StartupError: the client is not installed, or there is no server.
    """
    found = find_client(client)
    executable = shutil.which(found.executable)
    if executable is None:
        raise ConfigError(f"{found.title} is not installed: there is no `{found.executable}`; try: {found.install}")
    with tempfile.TemporaryDirectory(prefix="vllm-mlx-") as name:
        folder = Path(name)
        with _stopped_by_signals(), _server(config, url, has_model=has_model, folder=folder) as target:
            _warn_of_little_context(found, target)
            setup = set_up(found, target, folder=folder / "client", ask=_asking(executable))
            setup.write()
            return _run(executable, setup, arguments)


def connect(config: Config, *, client: str, url: str | None) -> int:
    """Print what `launch` would do, for a shell; returns 0. Raises ConfigError: there is no server."""
    found = find_client(client)
    address = base_url(url) if url is not None else own_url(config)
    try:
        target = find_target(address, key=config.api_key)
    except NoServer as error:
        raise ConfigError(f"{error}; start a server first: vllm-mlx serve MODEL") from None
    folder = Path(tempfile.gettempdir()) / f"{_CONNECT_FOLDER}-{os.getuid()}" / found.name
    _warn_of_little_context(found, target)
    print(script(found, target, folder=folder, ask=_asking(shutil.which(found.executable))), end="")
    return 0


def script(client: Client, target: Target, *, folder: Path, ask: Ask = no_answer) -> str:
    """Shell commands that set a client up for a server, and the client's own command."""
    setup = set_up(client, target, folder=folder, ask=ask)
    lines = [
        f"# {client.title} on {target.model} at {target.url}, {target.context_tokens:,} tokens of context",
        f"# to install it: {client.install}",
    ]
    if setup.files:
        lines.append(f"mkdir -p {' '.join(sorted({shlex.quote(str(path.parent)) for path in setup.files}))}")
    for path, text in setup.files.items():
        lines += [f"cat > {shlex.quote(str(path))} <<'END_OF_FILE'", text.rstrip("\n"), "END_OF_FILE"]
    if setup.unset:
        lines.append(f"unset {' '.join(setup.unset)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in setup.environment.items()]
    return "\n".join([*lines, shlex.join(setup.command)]) + "\n"


def _warn_of_little_context(client: Client, target: Target) -> None:
    if target.context_tokens < client.min_context_tokens:
        print(
            f"vllm-mlx: {client.title} needs about {client.min_context_tokens:,} tokens of context, and {target.model} "
            f"has {target.context_tokens:,}: it will compact its conversation again and again, or stop",
            file=sys.stderr,
        )


def _asking(executable: str | None) -> Ask:
    """Asks the program; one that takes too long has nothing to say."""

    def ask(*arguments: str) -> str | None:
        if executable is None:
            return None
        command = [executable, *arguments]
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASK_S, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return ended.stdout

    return ask


@contextmanager
def _server(config: Config, url: str | None, *, has_model: bool, folder: Path) -> Iterator[Target]:
    """The server that answers already, else one of our own for as long as the block runs."""
    address = base_url(url) if url is not None else own_url(config)
    try:
        target = find_target(address, key=config.api_key)
    except NoServer as error:
        if url is not None:
            raise ConfigError(str(error)) from None
        if not has_model:
            raise ConfigError(f"{error}; start one with `vllm-mlx serve MODEL`, or give --model MODEL here") from None
    else:
        if url is None and has_model and config.model_name != target.model:
            raise ConfigError(
                f"--model: a server at {address} serves {target.model!r}; leave --model out to use it, or choose "
                f"another --port for {config.model_name!r}"
            )
        yield target
        return
    print(f"vllm-mlx: starting a server for {config.model_name}", file=sys.stderr)
    with OwnServer(config, log=folder / "server.log") as server:
        server.wait_ready(address)
        yield find_target(address, key=config.api_key)


def _run(executable: str, setup: Setup, arguments: Sequence[str]) -> int:
    """Run the client in the foreground: what the terminal sends is its own affair."""
    command = [executable, *setup.command[1:], *arguments]
    process = subprocess.Popen(command, env=setup.environment_from(os.environ))
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, earlier)
        if process.poll() is None:
            process.terminate()
            process.wait()
    return code if code >= 0 else _SIGNALLED - code


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, so that nothing that was started stays behind."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(_SIGNALLED + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    earlier = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)
