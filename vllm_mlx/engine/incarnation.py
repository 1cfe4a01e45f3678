"""One life of the engine process, as its supervisor sees it: the process, its private folder, its sockets, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from vllm_mlx.core.messages import Failed, FromEngine, Shutdown, ToEngine
from vllm_mlx.engine.transport import ServerChannel

EXIT_FAILED = 70
"""Exit code of a child that sent `Failed` (EX_SOFTWARE of sysexits.h)."""
SILENCE_CHECKS = 5
"""How often within the silence limit it is checked whether the child said something."""
FIRST_SIGN_TIMEOUT_S = 120.0
"""Until its first message a child may be busy with imports, on a cold disk."""
LAST_WORDS_TIMEOUT_S = 2.0
"""How long `Failed` may take to arrive after the child exited, and the child to exit after it sent `Failed`."""
SHUTDOWN_TIMEOUT_S = 5.0
TERMINATE_TIMEOUT_S = 2.0
KILL_TIMEOUT_S = 5.0
MAX_FOLDER_LENGTH = 60
"""A Unix socket's path must be shorter than 104 bytes on macOS; a longer temporary folder is not used."""


class Ending(msgspec.Struct, frozen=True):
    """How a child ended."""

    reason: str
    is_model_error: bool = False


class Incarnation:
    """Starts the process at once; used on one event loop.

    Raises:
        OSError: the command cannot be run, or there is no room for the folder or the sockets.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        on_message: Callable[[FromEngine], None],
        silence_limit_s: float,
    ) -> None:
        self._on_message = on_message
        self._silence_limit_s = silence_limit_s
        self._was_heard = False
        self._is_silent = False
        self._failure: asyncio.Future[Failed] = asyncio.get_running_loop().create_future()
        self._folder = _make_folder()
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._channel = ServerChannel(self._folder, self._receive)
            undo.callback(self._channel.close)
            self._process = _Process([*command, self._folder], env)
            self._cleanup = undo.pop_all()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Pass a message on without waiting."""
        self._channel.send(message)

    async def wait_end(self) -> Ending:
        """Wait until the process is gone and all that it said was heard. Kills it when it falls silent."""
        interval_s = self._silence_limit_s / SILENCE_CHECKS
        patience_s = max(FIRST_SIGN_TIMEOUT_S, self._silence_limit_s)
        silent_s = 0.0
        while not await self._process.wait(interval_s):
            # Checks count, not the clock: when this very process was frozen, only one of them was missed.
            if self._was_heard:
                patience_s, silent_s = self._silence_limit_s, 0.0
            else:
                silent_s += interval_s
            self._was_heard = False
            if silent_s >= patience_s:
                self._is_silent = True
                self._process.kill()
        return await self._last_words(self._process.exit_code, patience_s)

    async def shut_down(self, *, is_ready: bool) -> None:
        """Make the process end: politely if it listens already, then less so. Returns when it is gone."""
        if is_ready:
            self.send(Shutdown())
            if await self._process.wait(SHUTDOWN_TIMEOUT_S):
                return
        self._process.terminate()
        if not await self._process.wait(TERMINATE_TIMEOUT_S):
            self._process.kill()
            await self._process.wait(KILL_TIMEOUT_S)

    def close(self) -> None:
        """Kill the process if it is there, and remove folder and sockets. No message is handed on after this."""
        self._process.close()
        self._cleanup.close()

    def _receive(self, message: FromEngine) -> None:
        self._was_heard = True
        if isinstance(message, Failed) and not self._failure.done():
            self._failure.set_result(message)
            asyncio.get_running_loop().call_later(LAST_WORDS_TIMEOUT_S, self._process.kill)
        self._on_message(message)

    async def _last_words(self, exit_code: int, patience_s: float) -> Ending:
        self._channel.drain()
        if exit_code == EXIT_FAILED:
            await asyncio.wait({self._failure}, timeout=LAST_WORDS_TIMEOUT_S)
        if self._failure.done():
            failure = self._failure.result()
            return Ending(failure.reason, failure.is_model_error)
        if self._is_silent:
            return Ending(f"The engine process was silent for {patience_s:g} s and was killed.")
        return Ending(f"The engine process {_describe_exit(exit_code)}.")


class _Process:
    """A child in a session of its own: Ctrl-C in the terminal does not reach it. Its standard input is a pipe that
    nothing is ever written to; when this process dies, the system closes it and the child knows."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._popen = subprocess.Popen(
            command,
            env=os.environ | dict(env),
            stdin=subprocess.PIPE,
            stdout=2,  # what libraries print must not mix with what a command prints
            start_new_session=True,
        )
        threading.Thread(target=self._reap, name="engine-reaper", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int:
        """Negative for a signal. Only once `wait` returned True."""
        return self._exit.result()

    async def wait(self, timeout_s: float) -> bool:
        """Whether the process ended within that time."""
        await asyncio.wait({self._exit}, timeout=timeout_s)
        return self._exit.done()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        if self._popen.stdin:
            self._popen.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        if not self._exit.done():
            # macOS answers PermissionError for a process that ended and was not waited for yet.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, number)

    def _reap(self) -> None:
        """A thread of its own waits for the end: seen at once, on every system and with every event loop."""
        code = self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._exit.set_result, code)


def _make_folder() -> str:
    """A folder that only this user can enter, with a path short enough for sockets."""
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="vllm-mlx-", dir=base if len(base) <= MAX_FOLDER_LENGTH else "/tmp")


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"
