"""The servers that are compared: how each is installed, started and asked."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 900
OURS = "ours"


@dataclass(frozen=True)
class Installation:
    """An interpreter that has a server."""

    python: Path
    is_foreign: bool
    """An environment of its own: our PYTHONPATH must not reach it."""


@dataclass(frozen=True)
class Server:
    """How to run one. In the command `{python}`, `{bin}`, `{model}` and `{port}` stand for what they say."""

    name: str
    requirement: str | None
    """To install it; None for our own, which is here."""
    command: tuple[str, ...]
    ready_path: str
    """Answers 200 once requests may be sent."""
    model_id: str | None = None
    """To name in requests; None: the first that it lists."""
    keeps_files: bool = False
    """Writes caches below the home folder and reads them at the next start, so it gets a new home each time."""

    def fill(self, installation: Installation, *, model: Path, port: int, extra: tuple[str, ...]) -> list[str]:
        """The command line."""
        python = installation.python
        values = {"python": str(python), "bin": str(python.parent), "model": str(model), "port": str(port)}
        return [part.format_map(values) for part in self.command] + list(extra)


SERVERS = {
    server.name: server
    for server in (
        Server(
            OURS,
            None,
            ("{python}", "-m", "vllm_mlx.cli.main", "serve", "{model}", "--port", "{port}"),
            ready_path="/readyz",
        ),
        Server(
            "mlx-lm",
            "mlx-lm==0.32.2",
            ("{python}", "-m", "mlx_lm", "server", "--model", "{model}", "--port", "{port}"),
            ready_path="/v1/models",
            model_id="{model}",
        ),
        # without --continuous-batching it answers one request at a time
        Server(
            "vllm-mlx",
            "vllm-mlx==0.6.0",
            ("{bin}/vllm-mlx", "serve", "{model}", "--port", "{port}", "--continuous-batching"),
            ready_path="/v1/models",
            keeps_files=True,
        ),
        Server(
            "rapid-mlx",
            "rapid-mlx==0.16.10",
            ("{bin}/rapid-mlx", "serve", "{model}", "--port", "{port}"),
            ready_path="/v1/models",
            keeps_files=True,
        ),
    )
}


class Unusable(Exception):
    """A server cannot be installed or started; the message says why."""


def install(server: Server, folder: Path, *, uv: str, backend: str | None) -> Installation:
    """A virtual environment with the server, made once. `backend`: MLX's extra on Linux, such as 'cpu'.

    Raises:
        Unusable: the installer fails.
    """
    assert server.requirement is not None
    home = folder / f"{server.requirement}-{backend or 'default'}"
    installation = Installation(home / "bin" / "python", is_foreign=True)
    if (home / "complete").exists():
        return installation
    wanted = [server.requirement, *([f"mlx[{backend}]"] if backend else [])]
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(home)],
        [uv, "pip", "install", "--quiet", "--python", str(installation.python), *wanted],
    ):
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise Unusable(f"cannot be installed: {done.stderr.strip()[-600:]}")
    (home / "complete").touch()
    return installation


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def wait_ready(process: subprocess.Popen[bytes], url: str, *, log: Path) -> None:
    """Until the address answers 200. Raises Unusable if the process ends, or after a quarter of an hour."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Unusable(f"ended with code {process.returncode} while starting: {last_words(log)}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.5)
    raise Unusable(f"not ready after {START_TIMEOUT_S} s: {last_words(log)}")


def last_words(log: Path) -> str:
    """The end of a log, on one line."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return " / ".join(line.strip() for line in lines[-4:])[-600:]
