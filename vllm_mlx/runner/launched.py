"""A step under way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import msgspec

from vllm_mlx.core.step import DecodeRow, PromptLogprobs, Step, TokenLogprobs
from vllm_mlx.runner.codec import Exports
from vllm_mlx.runner.sampler import Sampled, SampledRow
from vllm_mlx.runner.scoring import Scores


class Unsampled(msgspec.Struct, frozen=True, eq=False):
    """Rows whose tokens are still to be chosen."""

    logits: list[mx.array]
    """[rows, vocab] each."""
    order: list[SampledRow]
    """Of all their rows."""


class Launched(msgspec.Struct, eq=False):
    """A step that is built or under way."""

    step: Step
    sampled: list[Sampled]
    unsampled: list[Unsampled]
    """What waits for masks; empty once they came."""
    order: tuple[int, ...]
    """Slots in the order of the sampled rows, padding left out."""
    written: list[mx.array]
    """All arrays that the step changes: evaluating them carries it out. Emptied once they are under way."""
    marker: mx.array | None
    """A number that is there when the step is done; None if its tokens tell, or it computes nothing."""
    checkpoint_bytes: tuple[int, ...]
    exports: Exports
    scores: dict[int, Scores]
    """By slot, of the chunks whose prompt tokens are scored."""
    launched_at: float = 0.0
    """When it was started, by `time.monotonic()`."""

    def chosen(self) -> tuple[dict[int, int], dict[int, TokenLogprobs | None]]:
        """By slot the tokens, and log-probabilities if any were asked; waits for them."""
        if not self.sampled and self.marker is not None:
            mx.eval(self.marker)
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprobs | None] = {}
        slots = iter(self.order)
        for sampled in self.sampled:
            part = list(itertools.islice(slots, sampled.num_rows))
            token_ids: Any = sampled.tokens.tolist()
            tokens.update(zip(part, token_ids, strict=False))  # padding is last
            if sampled.logprobs is not None:
                logprobs.update(zip(part, sampled.logprobs.collect(len(part)), strict=True))
        return tokens, logprobs

    def prompt_logprobs(self) -> tuple[PromptLogprobs | None, ...] | None:
        """Plain numbers for `StepResult`; waits for them."""
        found = (self.scores.get(row.slot) for row in self.step.prefills)
        return tuple(each.collect() if each else None for each in found) if self.scores else None


def sampled_only(logits: mx.array, rows: Sequence[DecodeRow]) -> list[mx.array]:
    """Of logits [rows, vocab] those of the rows that are sampled; nothing if none is."""
    index = [i for i, row in enumerate(rows) if row.samples]
    if len(index) == len(rows):
        return [logits]
    return [logits[mx.array(index)]] if index else []
