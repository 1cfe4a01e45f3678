"""Drives a runner with steps made by hand: which pages and which checkpoints a sequence has is up to the test."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import DecodeRow, NewSequence, PrefillRow, Runner, Step, StepResult

STRIDE = 30
"""From a page in one group of layers to the page for the same tokens in the next."""


class Hand:
    """Sequences by slot, greedy. `pages` are given by the test, or taken from the next unused ones.

    They are those of the first group of layers; a sequence has the same ones in the others, `STRIDE` further on.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.tokens: dict[int, list[int]] = {}
        self.pages: dict[int, tuple[int, ...]] = {}
        self._number = 0
        self._next_page = 1

    def run(self, step: Step) -> StepResult:
        """Launch and collect; sampled tokens join their sequences."""
        self._number += 1
        step = msgspec.structs.replace(step, number=self._number)
        result = self.runner.collect(self.runner.launch(step))
        assert result.number == self._number
        for slot, token in zip(step.sampled_slots, result.token_ids, strict=True):
            self.tokens[slot].append(token)
        return result

    def new(
        self,
        slot: int,
        tokens: Sequence[int],
        *,
        shared: Sequence[int] = (),
        num_cached: int = 0,
        checkpoint: int | None = None,
    ) -> NewSequence:
        """A sequence of 5 pages, the first of them `shared`; it must join a step."""
        self.tokens[slot] = list(tokens)
        if self.runner.info.num_pages:
            more = 5 - len(shared)
            self.pages[slot] = (*shared, *range(self._next_page, self._next_page + more))
            self._next_page += more
        else:
            self.pages[slot] = ()
        params = SamplingParams(temperature=0.0, seed=1)
        return NewSequence(slot, params, tuple(tokens), len(tokens), num_cached=num_cached, checkpoint=checkpoint)

    def everywhere(self, page_ids: Sequence[int]) -> tuple[int, ...]:
        """Pages of the first group, then those of the others for the same tokens."""
        return (*page_ids, *(page_id for table in self._others(page_ids) for page_id in table))

    def _others(self, page_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        num_others = len(self.runner.info.cache.windows) - 1
        return tuple(tuple(page_id + STRIDE * (i + 1) for page_id in page_ids) for i in range(num_others))

    def prefill(self, slot: int, start: int, end: int | None = None) -> PrefillRow:
        """A chunk; up to the end it samples."""
        known = self.tokens[slot]
        pages = self.pages[slot]
        return PrefillRow(slot, start, tuple(known[start:end]), pages, end is None, self._others(pages))

    def decode(self, *slots: int) -> tuple[DecodeRow, ...]:
        """A row for each slot."""
        at = [(slot, len(self.tokens[slot]) - 1, self.pages[slot]) for slot in slots]
        return tuple(DecodeRow(slot, position, pages, self._others(pages)) for slot, position, pages in at)

    def generate(self, slot: int, num_tokens: int) -> list[int]:
        """Decode a sequence alone; returns its last tokens."""
        for _ in range(num_tokens):
            self.run(Step(0, decodes=self.decode(slot)))
        return self.tokens[slot][-num_tokens:]

    def cold(self, slot: int, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """What a sequence gives that starts with nothing; it is released."""
        new = self.new(slot, tokens)
        self.run(Step(0, new=(new,), prefills=(self.prefill(slot, 0),)))
        self.generate(slot, num_tokens - 1)
        found = self.tokens[slot][-num_tokens:]
        self.run(Step(0, released=(slot,)))
        return found


def payloads_of(result: StepResult) -> tuple[bytes, ...]:
    """What a step gave out."""
    taken = tuple(bytes(each.take()) for each in result.exported)
    assert [len(payload) for payload in taken] == [each.nbytes for each in result.exported]
    return taken
