"""What a test needs to drive the engine's rounds on its own thread: a watched scheduler, and orders in turns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_mlx.core.step import Step, StepResult
from vllm_mlx.engine.overlap import Overlap
from vllm_mlx.engine.scheduler import Scheduler


class Turns(Overlap):
    """Tokens are collected first or last in turns, whatever rounds take."""

    def __init__(self, collects_first: Sequence[bool]) -> None:
        super().__init__()
        self._turns = itertools.cycle(collects_first)
        self.collects_first = next(self._turns)

    def observe(self, waited_s: float, round_s: float) -> None:
        """See `Overlap`."""
        self.collects_first = next(self._turns)


class Watched(Scheduler):
    """Keeps its steps, and is checked whenever they are planned or committed."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.steps: list[Step] = []
        self.plans_ahead = False
        """Whether steps are planned ahead wherever that may be done, not only where somebody gains by it."""
        self.late_aborts: Sequence[str] = ()
        """Nobody's wish any more once the next step is planned."""
        self.costs_s: Sequence[float] | None = None
        """What steps are said to have taken, in turns; None for what they took."""
        self._num_committed = 0

    def can_let_in(self) -> bool:
        """See `Scheduler`."""
        return super().can_let_in() or (self.plans_ahead and not self._has_preempted)

    def plan(self) -> Step | None:
        """See `Scheduler`."""
        step = super().plan()
        self.check()
        self.steps += [] if step is None else [step]
        for name in self.late_aborts:
            self.abort(name)
        return step

    def commit(self, result: StepResult) -> None:
        """See `Scheduler`."""
        if self.costs_s is not None:
            cost_s = self.costs_s[self._num_committed % len(self.costs_s)]
            result = msgspec.structs.replace(result, elapsed_s=cost_s)
        self._num_committed += 1
        super().commit(result)
        self.check()
