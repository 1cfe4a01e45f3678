"""The engine on a thread of this process: no supervision and a shared interpreter, but nothing to set up."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable

from vllm_mlx.core.config import Config
from vllm_mlx.core.grammar import GrammarsFactory
from vllm_mlx.core.messages import EngineState, Failed, FromEngine, Shutdown, ToEngine
from vllm_mlx.core.step import ProgressCallback, RunnerFactory, RunnerInfo
from vllm_mlx.engine.client import BaseClient, log
from vllm_mlx.engine.engine import Engine

STOP_TIMEOUT_S = 30.0
"""How long `stop` waits for the step in progress."""


class ThreadEngine(BaseClient):
    """An `EngineClient` for scripts and tests. A crash of the device's code ends the whole process."""

    def __init__(
        self,
        factory: RunnerFactory,
        config: Config,
        *,
        on_progress: ProgressCallback | None = None,
        leave_thread: Callable[[], None] | None = None,
        grammars: GrammarsFactory | None = None,
    ) -> None:
        """`leave_thread` is the last call on the engine's thread, for what a device library keeps per thread."""
        super().__init__(on_progress)
        self._leave_thread = leave_thread
        self._grammars = grammars
        self._inbox = _QueueInbox()
        self._factory = factory
        self._config = config
        self._failure: Failed | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> RunnerInfo:
        """Load the model on a new thread; see `EngineClient`. May be called once."""
        if self._thread is not None:
            raise RuntimeError("start() was called before.")
        if self._state is not EngineState.STOPPED:
            loop = asyncio.get_running_loop()
            # A daemon, so that a script that forgets to stop the engine can still end.
            self._thread = threading.Thread(target=self._run, args=(loop,), name="engine", daemon=True)
            self._thread.start()
        return await self._wait_started()

    async def stop(self) -> None:
        """End the engine after the step in progress; see `EngineClient`."""
        self._become_stopped()
        if self._thread is None:
            return
        self._inbox.put(Shutdown())
        # Joined, not only told of its end: a process that exits while the thread still frees the model is aborted.
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("the engine's thread did not end within %.0f s; it is left behind", STOP_TIMEOUT_S)

    def _send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def _receive(self, message: FromEngine) -> None:
        super()._receive(message)
        if isinstance(message, Failed):
            self._failure = message

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread's main function."""
        outbox = _LoopOutbox(loop, self._receive, self._inbox)
        try:
            Engine(self._factory, self._config, inbox=self._inbox, outbox=outbox, grammars=self._grammars).run()
        finally:
            if self._leave_thread is not None:
                self._leave_thread()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._thread_ended)

    def _thread_ended(self) -> None:
        failure = self._failure or Failed("The engine's thread ended.")
        self._stats.engine_ended()
        self._give_up(failure.reason, is_model_error=failure.is_model_error)


class _QueueInbox:
    """The engine's `Inbox`, filled by the event loop."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()

    def put(self, message: ToEngine) -> None:
        self._queue.put(message)

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        messages: list[ToEngine] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._queue.get(timeout_s != 0, timeout_s))
            while True:
                messages.append(self._queue.get_nowait())
        return messages


class _LoopOutbox:
    """The engine's `Outbox`: calls back on the event loop; when that is closed, it tells the engine to end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, receive: Callable[[FromEngine], None], inbox: _QueueInbox
    ) -> None:
        self._loop = loop
        self._receive = receive
        self._inbox = inbox

    def send(self, message: FromEngine) -> None:
        try:
            self._loop.call_soon_threadsafe(self._receive, message)
        except RuntimeError:
            self._inbox.put(Shutdown())
