"""The engine loop: messages in, steps to the runner, outputs out."""

from __future__ import annotations

import time
from typing import Protocol

import msgspec

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError, ModelError
from vllm_mlx.core.grammar import GrammarsFactory
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.messages import (
    Abort,
    CacheForget,
    CacheForgotten,
    CacheLookedUp,
    CacheLookup,
    Failed,
    FromEngine,
    Outputs,
    Progress,
    Ready,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
)
from vllm_mlx.core.step import Runner, RunnerFactory
from vllm_mlx.engine.constraints import Constraints
from vllm_mlx.engine.rounds import Rounds
from vllm_mlx.engine.scheduler import Scheduler
from vllm_mlx.kv.disk import DiskCache, open_disk

log = get_logger("engine")

STATS_INTERVAL_S = 0.25
DISK_PAUSE_S = 0.002
"""Between two looks at what was loaded, when nothing else can be done."""
WRITE_OUT_TIMEOUT_S = 2.0
"""At the end. As long again for the disk: whoever stops the process waits for five seconds."""
DISK_REPORT_INTERVAL_S = 1.0
"""Between two reports while nothing is left to do but what the disk does by itself."""
REST_AFTER_S = 2.0
"""The next request of a conversation comes soon; memory dropped before would have to be asked for again."""


class Inbox(Protocol):
    """Where messages to the engine arrive. Called on the engine's thread only."""

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        """All messages that are there, in order. 0: do not wait; None: wait for one; else wait at most so long."""
        ...


class Outbox(Protocol):
    """Where the engine's messages go. Called on the engine's thread only."""

    def send(self, message: FromEngine) -> None:
        """Pass a message on; never blocks."""
        ...


class Engine:
    """One model on one thread: the thread that calls `run()` loads the model, computes and frees.

    `stats` may be read from any thread: the last statistics sent.
    """

    _runner: Runner
    _scheduler: Scheduler
    _constraints: Constraints

    def __init__(
        self,
        factory: RunnerFactory,
        config: Config,
        *,
        inbox: Inbox,
        outbox: Outbox,
        grammars: GrammarsFactory | None = None,
    ) -> None:
        """Without `grammars`, sequences that are to follow one fail."""
        self._factory = factory
        self._grammars = grammars
        self._config = config
        self._inbox = inbox
        self._outbox = outbox
        self._disk: DiskCache | None = None
        self._rounds: Rounds | None = None
        self._is_resting = False
        self._stats_sent_at = 0.0
        self.stats = Stats()

    def run(self) -> None:
        """Load the model, say Ready, and serve until Shutdown.

        Whatever goes wrong is sent as Failed. After a failed step nobody knows what the device holds, so the engine
        ends and its supervisor starts another.
        """
        runner: Runner | None = None
        try:
            self._runner = runner = self._factory(self._send_progress)
            self._disk = open_disk(self._config, runner.info)
            self._constraints = Constraints(self._grammars, vocab_size=runner.info.vocab_size)
            self._scheduler = Scheduler(runner.info, self._config, disk=self._disk, constraints=self._constraints)
            self._rounds = rounds = Rounds(self._scheduler, runner, self._constraints, tell=self._send_outputs)
            self._outbox.send(Ready(runner.info))
            with self._constraints:
                self._loop(rounds)
                self._write_out(rounds)
        except (ModelError, ConfigError) as error:
            self._outbox.send(Failed(error.message, is_model_error=True))
        except Exception as error:
            log.exception("the engine failed")
            self._outbox.send(Failed(f"{type(error).__name__}: {error}"))
        finally:
            if self._rounds is not None:
                self._rounds.drop()
            if self._disk is not None:
                self._disk.close()
            _close(runner)

    @property
    def step_started_at(self) -> float | None:
        """See `Rounds`. May be read from any thread."""
        return self._rounds.step_started_at if self._rounds is not None else None

    def _loop(self, rounds: Rounds) -> None:
        while self._receive():
            rounds.round()
            self._is_resting = self._is_resting and not rounds.has_in_flight
            self._tell()

    def _receive(self) -> bool:
        """Take messages in, waiting for one if there is nothing else to do; False when the engine is to end."""
        for message in self._inbox.receive(self._pause_s) if self._is_busy else self._rest():
            match message:
                case Submit():
                    self._scheduler.submit(message)
                case Abort():
                    self._scheduler.abort(message.request_id)
                case CacheLookup(query_id, prompt):
                    self._outbox.send(CacheLookedUp(query_id, self._scheduler.lookup(prompt)))
                case CacheForget(query_id):
                    freed = self._scheduler.forget()
                    self._send_stats()
                    self._outbox.send(CacheForgotten(query_id, freed))
                case Shutdown():
                    return False
        return True

    def _tell(self) -> None:
        """Send what the round gave and, now and then, how things stand."""
        self._send_outputs()
        if time.monotonic() - self._stats_sent_at >= STATS_INTERVAL_S:
            self._send_stats()

    def _send_outputs(self) -> None:
        outputs = self._scheduler.take_outputs()
        if outputs:
            self._outbox.send(Outputs(outputs))

    def _write_out(self, rounds: Rounds) -> None:
        """Before the end: hand what is worth keeping to the disk."""
        self._scheduler.abort_all()
        deadline = time.monotonic() + WRITE_OUT_TIMEOUT_S
        while self._disk is not None and self._is_busy and time.monotonic() < deadline:
            rounds.round()

    @property
    def _pause_s(self) -> float:
        """How long a message may be waited for although there is work."""
        return DISK_PAUSE_S if not self._has_in_flight and self._scheduler.waits_for_threads else 0

    @property
    def _is_busy(self) -> bool:
        return self._has_in_flight or self._scheduler.has_work

    @property
    def _has_in_flight(self) -> bool:
        return self._rounds is not None and self._rounds.has_in_flight

    def _rest(self) -> list[ToEngine]:
        """Nothing to do: say so, wait for messages, and drop temporary memory if none come for a while.

        Whatever comes starts that while anew: who asks what is kept is likely to send a prompt next.
        """
        if not self._is_resting:
            self._is_resting = True
            self._send_stats()
        if messages := self._inbox.receive(REST_AFTER_S):
            return messages
        while self._runner.idle():
            if messages := self._inbox.receive(0):
                return messages
        if self._runner.memory().cache != self.stats.memory.cache:
            self._send_stats()
        while self.stats.disk is not None and self.stats.disk.queued_bytes:
            if messages := self._inbox.receive(DISK_REPORT_INTERVAL_S):
                return messages
            self._send_stats()
        return self._inbox.receive(None)

    def _send_stats(self) -> None:
        memory, disk = self._runner.memory(), self._disk.stats() if self._disk else None
        if disk is not None:
            memory = msgspec.structs.replace(memory, staging=disk.queued_bytes + disk.ahead_bytes)
        self.stats = msgspec.structs.replace(self._scheduler.stats(), memory=memory, disk=disk, busy=self._is_busy)
        self._stats_sent_at = time.monotonic()
        self._outbox.send(self.stats)

    def _send_progress(self, text: str, fraction: float | None = None) -> None:
        self._outbox.send(Progress(text, fraction))


def _close(runner: Runner | None) -> None:
    """Free the runner, if there is one; the engine ends either way."""
    try:
        if runner is not None:
            runner.close()
    except Exception:
        log.exception("the runner did not close")
