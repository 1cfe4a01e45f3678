"""The order in which steps are planned, built, started and collected, so that neither device nor host waits for long.

While step N is computed, step N + 1 is planned, built and started; only then are N's tokens waited for. Or before it is
started: where the device waits for the host, see `Overlap`, and where they are first tokens, which are told at once:
starting a step takes a host milliseconds.

Starting a long one takes a GPU's host until the device has nearly done it. So where many may begin behind N + 1, who
waited for its prefix, N + 2 is planned before N + 1 is started: afterwards the device would wait for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_mlx.core.step import Runner
from vllm_mlx.engine.constraints import Constraints
from vllm_mlx.engine.draft import Launched
from vllm_mlx.engine.overlap import Overlap
from vllm_mlx.engine.scheduler import Scheduler


class _Built(NamedTuple):
    handle: Any
    launched: Launched

    @property
    def gives_tokens(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self.launched.step.sampled_slots)

    @property
    def gives_first(self) -> bool:
        """Whether somebody waits for a first token."""
        return any(row.samples for row in self.launched.step.prefills)


class Rounds:
    """Has a runner carry out what a scheduler plans. One thread.

    `tell` is called when there are outputs that should not wait for the end of the round.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        constraints: Constraints,
        *,
        tell: Callable[[], None],
        overlap: Overlap | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._constraints = constraints
        self._tell = tell
        self._overlap = overlap or Overlap()
        self._in_flight: _Built | None = None
        self._ahead: Launched | None = None
        """Planned, not built."""
        self.step_started_at: float | None = None
        """When (`time.monotonic()`) the step that is being computed now was begun, None between steps."""

    @property
    def has_in_flight(self) -> bool:
        """Whether a step was started that is not collected."""
        return self._in_flight is not None

    def round(self) -> None:
        """Start one more step, if there is work for one, and collect the one before."""
        begun, in_flight = time.monotonic(), self._in_flight
        self._sample()
        built = self._build()
        gives_tokens = in_flight is not None and in_flight.gives_tokens
        gives_first = in_flight is not None and in_flight.gives_first
        if gives_first or (gives_tokens and self._overlap.collects_first):
            waited_s = self._collect()
            if gives_first:
                self._tell()
            self._prepare_masks(built)
            self._start(built)
            self._scheduler.look_ahead()
        else:
            if built is not None and not gives_tokens and self._scheduler.can_let_in():
                self._ahead = self._plan()
            self._start(built)
            self._scheduler.look_ahead()
            waited_s = self._collect()
            self._prepare_masks(built)
        self._in_flight = built
        if gives_tokens:
            self._overlap.observe(waited_s, time.monotonic() - begun)
        self.step_started_at = time.monotonic() if built is not None else None

    def drop(self) -> None:
        """Forget what is in flight: it holds on to what the runner is about to free."""
        self._in_flight = self._ahead = self.step_started_at = None

    def _plan(self) -> Launched | None:
        return self._scheduler.newest if self._scheduler.plan() is not None else None

    def _build(self) -> _Built | None:
        """Get the next step ready; None if nothing can be computed now."""
        launched, self._ahead = self._ahead or self._plan(), None
        if launched is None:
            return None
        self.step_started_at = self.step_started_at or time.monotonic()
        return _Built(self._runner.build(launched.step), launched)

    def _start(self, built: _Built | None) -> None:
        if built is not None:
            self._runner.start(built.handle)

    def _sample(self) -> None:
        """Have the tokens of the step in flight chosen, if grammars have a say in that."""
        if self._in_flight is not None and self._constraints.has_prepared:
            self._runner.sample(self._in_flight.handle, self._constraints.masks)

    def _prepare_masks(self, built: _Built | None) -> None:
        """All tokens before those of a step are known: work out, while it runs, what these may be."""
        if built is not None and built.launched.constrained:
            self._constraints.prepare(built.launched.step.constrained, built.launched.constrained)

    def _collect(self) -> float:
        """Wait for the step that was in flight before this round's; returns for how many seconds."""
        if self._in_flight is None:
            return 0.0
        begun = time.monotonic()
        result = self._runner.collect(self._in_flight.handle)
        waited_s = time.monotonic() - begun
        self._scheduler.commit(result)
        return waited_s
