"""How a step's budget of prompt tokens is divided among prompts."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_mlx.core.messages import Output
from vllm_mlx.core.step import PrefillRow
from vllm_mlx.engine.draft import Draft
from vllm_mlx.engine.pace import PrefillPace
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.kv.manager import KVManager

SHORT = 4
"""A prompt is short beside another that has at least so many times as much left."""
AHEAD_S = 0.003
"""For how long a step the pages of prompts may be named whose turn comes later."""

Admit = Callable[[Sequence], bool]
"""Gives a waiting sequence a slot and pages, if they are there. False if it, and so nobody after it, can be taken."""


class Prefills:
    """Plans the chunks of a step: best first, while the budget lasts.

    With one exception, or a short prompt would wait behind all chunks of a long one: where the first prompt would take
    the whole budget, half of it is for short ones of the same priority behind it, in order. Half, because then nobody
    takes more than twice the time that it would have taken, however many short prompts come, and because these could
    not be twice as fast with all of it. What is theirs but no chunk's worth is saved for the next step: where a device
    is slow, the two take turns.
    """

    def __init__(self, kv: KVManager, pace: PrefillPace, *, page_size: int) -> None:
        self._kv = kv
        self._pace = pace
        self._page_size = page_size
        self._saved = 0
        """Tokens that short prompts may take now; less than none if they took more than was theirs."""
        self._may_look_up = True
        """Whether nobody was looked up in this step: naming the pages of a long prompt takes milliseconds."""

    def plan(self, draft: Draft, line: list[Sequence], *, budget: int, admit: Admit) -> None:
        """Put chunks into the draft. `line` is who has a prompt left to compute, with a slot or without, in order."""
        self._may_look_up = True
        door = _Door(admit)
        at = next((i for i, sequence in enumerate(line) if door.lets_in(sequence)), len(line))
        if at == len(line):
            return
        first, behind = line[at], line[at + 1 :]
        num_short = self._plan_short(draft, behind, first=first, budget=budget, door=door)
        rest = max(0, budget - num_short)
        # Where they took no more than their half, the rest is never too little for a chunk.
        size = self._chunk_size(first, rest, is_first=num_short <= budget // 2)
        self._compute(first, size, draft)
        self._plan_others(draft, behind, budget=max(0, rest - size), door=door)

    def name_ahead(self, waiting: list[Sequence], *, most: int) -> None:
        """Name the pages of those of the first `most` that are not named yet, as far as there is time."""
        until = time.monotonic() + AHEAD_S
        for sequence in waiting[:most]:
            if not sequence.is_named:
                self._expect(sequence)
                if time.monotonic() > until:
                    return

    def _plan_short(self, draft: Draft, behind: list[Sequence], *, first: Sequence, budget: int, door: _Door) -> int:
        """Chunks of short prompts within what is theirs; returns how many tokens they have."""
        num_left = first.num_to_prefill - first.num_computed
        limit, priority = num_left // SHORT if num_left > budget else 0, first.submit.priority
        short = [each for each in behind if each.submit.priority == priority and self._is_short(each, limit)]
        if not short:
            self._saved = min(0, self._saved)
            return 0
        begun = self._saved = min(budget, self._saved + budget // 2)
        for sequence in short:
            size = self._chunk_size(sequence, self._saved, is_first=self._saved == budget)
            if size == 0:
                break
            if door.lets_in(sequence) and self._is_short(sequence, limit):  # by what was really found
                size = self._chunk_size(sequence, self._saved, is_first=self._saved == budget)
                self._compute(sequence, size, draft)
                self._saved -= size
        return begun - self._saved

    def _plan_others(self, draft: Draft, behind: list[Sequence], *, budget: int, door: _Door) -> None:
        """Chunks of those behind the first that have none yet."""
        computed = {row.slot for row in draft.prefills}
        for sequence in behind:
            if sequence.slot in computed:
                continue
            size = self._chunk_size(sequence, budget, is_first=not draft.prefills)
            needs_look = size == 0 and sequence.slot is None and budget > 0
            if needs_look:
                # What is left may be enough for what it does not find. Who does not fit all the same, or is not let in,
                # ends the pass: a look takes time, and a thousand may wait.
                self._look_up(sequence)
                size = self._chunk_size(sequence, budget, is_first=not draft.prefills)
            if size == 0:
                return
            if door.lets_in(sequence):
                size = self._chunk_size(sequence, budget, is_first=not draft.prefills)  # of what was not found
                self._compute(sequence, size, draft)
                budget = max(0, budget - size)
            elif needs_look:
                return

    def _is_short(self, sequence: Sequence, limit: int) -> bool:
        """Whether at most `limit` tokens of its prompt are left to compute."""
        return limit > 0 and sequence.prefill_end - self._start(sequence, limit) <= limit

    def _chunk_size(self, sequence: Sequence, budget: int, *, is_first: bool) -> int:
        """Tokens of the sequence's next chunk: up to its next stop, or up to a page boundary within the budget."""
        start, end = self._start(sequence, budget), sequence.max_chunk_end
        end = min(end, self._kv.next_stop(sequence.request_id, start) or end)
        return self._pace.chunk(start, end, budget, page_size=self._page_size, is_first=is_first)

    def _start(self, sequence: Sequence, limit: int) -> int:
        """Where its next chunk begins; of a waiting one, by what a look told that was worth it for this limit."""
        if sequence.slot is not None:
            return sequence.num_computed
        if sequence.num_found is None and self._may_look_up and len(sequence.token_ids) > limit:
            self._may_look_up = False
            self._look_up(sequence)
        return sequence.num_found or 0

    def _look_up(self, sequence: Sequence) -> None:
        """See how much of a waiting one is there."""
        sequence.num_found = self._expect(sequence)

    def _expect(self, sequence: Sequence) -> int:
        known, blocks = sequence.token_ids, sequence.submit.prompt.blocks
        sequence.is_named = True
        return self._kv.expect(sequence.request_id, known, salt=sequence.salt, blocks=blocks)

    def _compute(self, sequence: Sequence, size: int, draft: Draft) -> None:
        """A chunk of a running sequence, or as much of it as there are pages for."""
        assert sequence.slot is not None
        start = sequence.num_computed
        size = self._kv.cover(sequence.request_id, start + size) - start
        if size <= 0:
            return
        token_ids = tuple(sequence.token_ids[start : start + size])
        samples = start + size == len(sequence.token_ids)
        if not samples and start == sequence.num_cached and not sequence.has_output:
            # The first token of a long prompt is far away; what was found is told at once.
            draft.outputs.append(Output(sequence.request_id, num_cached=start, queued_s=sequence.queued_s))
        page_ids, others = self._kv.row_tables(sequence.request_id)
        draft.prefills.append(PrefillRow(sequence.slot, start, token_ids, page_ids, samples, others))
        draft.add(sequence, size, samples=samples)
        draft.take_checkpoint(self._kv, sequence)


class _Door:
    """Lets waiting sequences in one after the other: nobody overtakes one that waits for a slot or for pages."""

    def __init__(self, admit: Admit) -> None:
        self._admit = admit
        self._is_open = True

    def lets_in(self, sequence: Sequence) -> bool:
        """Whether it has a slot, perhaps since now."""
        if sequence.slot is None and self._is_open:
            self._is_open = self._admit(sequence)
        return sequence.slot is not None
