"""The engine loop: messages in, steps to the runner, outputs out."""

from __future__ import annotations

import time
from typing import Any, Protocol

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
from vllm_mlx.core.step import Runner, RunnerFactory, Step
from vllm_mlx.engine.constraints import Constraints
from vllm_mlx.engine.overlap import Overlap
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

    `stats` and `step_started_at` may be read from any thread: the last statistics sent, and when
    (`time.monotonic()`) the step that is being computed now was begun, None between steps.
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
        self._in_flight: Any = None
        self._overlap = Overlap()
        self._is_resting = False
        self._stats_sent_at = 0.0
        self.stats = Stats()
        self.step_started_at: float | None = None

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
            self._outbox.send(Ready(runner.info))
            with self._constraints:
                self._loop()
                self._write_out()
        except (ModelError, ConfigError) as error:
            self._outbox.send(Failed(error.message, is_model_error=True))
        except Exception as error:
            log.exception("the engine failed")
            self._outbox.send(Failed(f"{type(error).__name__}: {error}"))
        finally:
            self.step_started_at = None
            self._in_flight = None  # it holds on to what the runner is about to free
            if self._disk is not None:
                self._disk.close()
            _close(runner)

    def _loop(self) -> None:
        """While step N is computed, step N + 1 is planned, built and started; only then are N's tokens waited for.

        Or before it is started: where the device waits for the host, see `Overlap`, and where they are first tokens,
        which are told at once.
        """
        while self._receive():
            self._round()
            self._tell()

    def _round(self) -> None:
        begun = time.monotonic()
        self._sample()
        in_flight = self._scheduler.uncommitted
        step = self._scheduler.plan()
        built = self._build(step)
        gives_tokens = in_flight is not None and bool(in_flight.step.sampled_slots)
        gives_first = in_flight is not None and any(row.samples for row in in_flight.step.prefills)
        if gives_first or (gives_tokens and self._overlap.collects_first):
            waited_s = self._collect()
            if gives_first:
                self._send_outputs()  # launching a step takes a host milliseconds, and these are waited for most
            self._prepare_masks()
            self._start(built)
        else:
            self._start(built)
            waited_s = self._collect()
            self._prepare_masks()
        self._in_flight = built
        if gives_tokens:
            self._overlap.observe(waited_s, time.monotonic() - begun)

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

    def _build(self, step: Step | None) -> Any:
        """Get the next step ready; its handle, or None if nothing can be computed now."""
        if step is None:
            return None
        self._is_resting = False
        self.step_started_at = self.step_started_at or time.monotonic()
        return self._runner.build(step)

    def _start(self, built: Any) -> None:
        if built is not None:
            self._runner.start(built)

    def _sample(self) -> None:
        """Have the tokens of the step in flight chosen, if grammars have a say in that."""
        if self._constraints.has_prepared:
            self._runner.sample(self._in_flight, self._constraints.masks)

    def _prepare_masks(self) -> None:
        """All tokens before those of the step planned last are known: work out, while it runs, what these may be."""
        launched = self._scheduler.uncommitted
        if launched is not None and launched.constrained:
            self._constraints.prepare(launched.step.constrained, launched.constrained)

    def _collect(self) -> float:
        """Wait for the step that was in flight before this round's; returns for how many seconds."""
        if self._in_flight is None:
            return 0.0
        begun = time.monotonic()
        result = self._runner.collect(self._in_flight)
        waited_s = time.monotonic() - begun
        self._scheduler.commit(result)
        return waited_s

    def _tell(self) -> None:
        """Send what the round gave and, now and then, how things stand."""
        self.step_started_at = None if self._in_flight is None else time.monotonic()
        self._send_outputs()
        if time.monotonic() - self._stats_sent_at >= STATS_INTERVAL_S:
            self._send_stats()

    def _send_outputs(self) -> None:
        outputs = self._scheduler.take_outputs()
        if outputs:
            self._outbox.send(Outputs(outputs))

    def _write_out(self) -> None:
        """Before the end: hand what is worth keeping to the disk."""
        self._scheduler.abort_all()
        deadline = time.monotonic() + WRITE_OUT_TIMEOUT_S
        while self._disk is not None and self._is_busy and time.monotonic() < deadline:
            self._round()

    @property
    def _pause_s(self) -> float:
        """How long a message may be waited for although there is work."""
        return DISK_PAUSE_S if self._in_flight is None and self._scheduler.waits_for_threads else 0

    @property
    def _is_busy(self) -> bool:
        return self._in_flight is not None or self._scheduler.has_work

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
