"""The child's side of `ProcessEngine`: sockets, heartbeat, and an end with its parent."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time

import msgspec
import zmq

from vllm_mlx.core.config import Config
from vllm_mlx.core.grammar import GrammarsFactory
from vllm_mlx.core.messages import Failed
from vllm_mlx.core.step import RunnerFactory
from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.incarnation import EXIT_FAILED
from vllm_mlx.engine.transport import SocketInbox, SocketOutbox

HEARTBEAT_INTERVAL_S = 1.0
YOUNG_OBJECTS = 50_000
"""After so many new ones the garbage collector looks at them; Python's own 700 come with a few requests."""


def run_child(
    socket_folder: str, *, factory: RunnerFactory, config: Config, grammars: GrammarsFactory | None = None
) -> int:
    """Run an engine on this thread until the server ends it or it fails; returns the process's exit code.

    Standard input must be the pipe that `ProcessEngine` opened: when it closes, the process exits at once. Nothing
    else may read it.
    """
    _exit_with_parent(socket_folder)
    collect_seldom()
    with zmq.Context() as context:  # leaving it waits until the last messages are sent
        inbox, outbox = SocketInbox(context, socket_folder), SocketOutbox(context, socket_folder)
        try:
            engine = Engine(factory, config, inbox=inbox, outbox=outbox, grammars=grammars)
            with Heartbeat(engine, context, socket_folder, stall_timeout_s=config.engine_stall_timeout):
                engine.run()
        finally:
            inbox.close()
            outbox.close()
    return EXIT_FAILED if outbox.has_failed else 0


def collect_seldom() -> None:
    """Have this process's garbage collected less often.

    What an engine drops is freed by itself, as it is in no cycles. But to look for some, the collector touches every
    token of every prompt that came since the last time: milliseconds in the middle of a burst.
    """
    gc.set_threshold(YOUNG_OBJECTS)


class Heartbeat:
    """Reports the engine's state from a second thread, so that a long step is no silence. A context manager.

    A step that takes longer than `stall_timeout_s` is reported as a failure, once; the server then kills the process.
    """

    def __init__(
        self,
        engine: Engine,
        context: zmq.Context[zmq.Socket[bytes]],
        folder: str,
        *,
        stall_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._context = context
        self._folder = folder
        self._stall_timeout_s = stall_timeout_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        outbox = SocketOutbox(self._context, self._folder)
        is_reported = False
        while not is_reported:
            is_reported = self._beat(outbox)
            if self._end.wait(HEARTBEAT_INTERVAL_S):
                break
        outbox.close()

    def _beat(self, outbox: SocketOutbox) -> bool:
        """Send one report; returns whether it was the engine's end."""
        started_at = self._engine.step_started_at
        if started_at is not None and time.monotonic() - started_at > self._stall_timeout_s:
            outbox.send(Failed(f"One step took longer than {self._stall_timeout_s:g} s."))
            return True
        outbox.send(msgspec.structs.replace(self._engine.stats, busy=started_at is not None))
        return False


def _exit_with_parent(socket_folder: str) -> None:
    """End this process, whatever it is doing, when the one that holds the other end of standard input is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        shutil.rmtree(socket_folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
