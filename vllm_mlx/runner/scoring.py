"""Log-probabilities of prompt tokens: logits at every position of a chunk, for the sequences that ask for them."""

from __future__ import annotations

import contextlib
from typing import Any

import mlx.core as mx
import msgspec

from vllm_mlx.core.step import NewSequence, PrefillRow, PromptLogprobs, TokenLogprobs
from vllm_mlx.runner.head import WantedPositions


class Scores(msgspec.Struct, frozen=True, eq=False):
    """Lazy results of one chunk."""

    start: int
    """Position of the first token scored."""
    chosen: mx.array
    """float32 [tokens]."""
    ranks: mx.array
    """int32 [tokens]."""
    top_ids: mx.array | None
    """[tokens, count], most likely first."""
    top: mx.array | None

    def arrays(self) -> list[mx.array]:
        """All of them."""
        return [array for array in (self.chosen, self.ranks, self.top_ids, self.top) if array is not None]

    def collect(self) -> PromptLogprobs:
        """Plain numbers; waits for them."""
        chosen: Any = self.chosen.tolist()
        ranks: Any = self.ranks.tolist()
        ids: Any = self.top_ids.tolist() if self.top_ids is not None else [()] * len(chosen)
        top: Any = self.top.tolist() if self.top is not None else [()] * len(chosen)
        found = (TokenLogprobs(a, tuple(b), tuple(c)) for a, b, c in zip(chosen, ids, top, strict=True))
        return PromptLogprobs(self.start, tuple(found), tuple(ranks))


class PromptScorer:
    """Knows which slots ask, and scores their chunks."""

    def __init__(self, wanted: WantedPositions) -> None:
        self._wanted = wanted
        self._prompts: dict[int, NewSequence] = {}
        self._taken: dict[int, Scores] = {}

    def add(self, new: NewSequence) -> None:
        """A sequence takes a slot."""
        if new.sampling.prompt_logprobs is not None:
            self._prompts[new.slot] = new

    def remove(self, slot: int) -> None:
        """The slot's sequence is gone."""
        self._prompts.pop(slot, None)

    def wants(self, row: PrefillRow) -> bool:
        """Whether tokens of the prompt follow tokens of this chunk, and are to be scored."""
        new = self._prompts.get(row.slot)
        return new is not None and row.start + 1 < new.num_prompt

    def positions(self, row: PrefillRow) -> contextlib.AbstractContextManager[None]:
        """For the time of the chunk's forward pass: logits where they are needed."""
        return self._wanted.everywhere() if self.wants(row) else contextlib.nullcontext()

    def take(self, row: PrefillRow, logits: mx.array) -> None:
        """Score a chunk by its logits [tokens, vocab], if that is wanted; see `taken`."""
        if not self.wants(row):
            return
        new = self._prompts[row.slot]
        targets = new.token_ids[row.start + 1 : min(new.num_prompt, row.start + 1 + len(row.token_ids))]
        count = new.sampling.prompt_logprobs or 0
        self._taken[row.slot] = _scores(logits[: len(targets)], targets, start=row.start + 1, count=count)

    def taken(self) -> dict[int, Scores]:
        """By slot, the scores of chunks since the last call."""
        taken, self._taken = self._taken, {}
        return taken


def _scores(logits: mx.array, targets: tuple[int, ...], *, start: int, count: int) -> Scores:
    logits = logits.astype(mx.float32)
    normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logits, mx.array(targets)[:, None], axis=-1)
    ranks = (logits >= own).sum(axis=-1).astype(mx.int32)
    chosen = (own - normaliser)[:, 0]
    if count == 0:
        return Scores(start, chosen, ranks, None, None)
    ids = mx.argpartition(-logits, count, axis=-1)[:, :count]
    top = mx.take_along_axis(logits, ids, axis=-1) - normaliser
    order = mx.argsort(-top, axis=-1)
    ids, top = mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(top, order, axis=-1)
    return Scores(start, chosen, ranks, ids, top)
