"""A step under way."""

from __future__ import annotations

import mlx.core as mx
import msgspec

from vllm_mlx.core.step import PromptLogprobs, Step
from vllm_mlx.runner.codec import Exports
from vllm_mlx.runner.sampler import Sampled, SampledRow
from vllm_mlx.runner.scoring import Scores


class Unsampled(msgspec.Struct, frozen=True, eq=False):
    """Rows whose tokens are still to be chosen."""

    logits: list[mx.array]
    """[rows, vocab] each."""
    order: list[SampledRow]
    """Of all their rows."""


class Launched(msgspec.Struct, frozen=True, eq=False):
    """A step under way."""

    step: Step
    sampled: list[Sampled]
    unsampled: list[Unsampled]
    """What waits for masks; empty once they came."""
    order: tuple[int, ...]
    """Slots in the order of the sampled rows, padding left out."""
    written: list[mx.array]
    """All arrays that the step changes: evaluating them carries it out. Emptied once they are under way."""
    marker: mx.array | None
    """A number that is there when the step is done; None if it computes nothing."""
    launched_at: float
    checkpoint_bytes: tuple[int, ...]
    exports: Exports
    scores: dict[int, Scores]
    """By slot, of the chunks whose prompt tokens are scored."""

    def prompt_logprobs(self) -> tuple[PromptLogprobs | None, ...] | None:
        """Plain numbers for `StepResult`; waits for them."""
        found = (self.scores.get(row.slot) for row in self.step.prefills)
        return tuple(each.collect() if each else None for each in found) if self.scores else None
