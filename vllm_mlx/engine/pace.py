"""How many prompt tokens a step may compute without making running streams stutter."""

from __future__ import annotations

import statistics
from collections import deque

from vllm_mlx.core.step import Step

MAX_STRETCH = 4.0
"""How much longer than the target a burst of new prompts may hold up a few running streams."""

IDLE_S = 2.0
"""What a step without running streams should take at most, so that first tokens come and aborts are seen."""
MIN_IDLE_TOKENS = 256
"""Of such a step all the same: with fewer, a slow device computes weights more often than prompts need."""

_WINDOW = 9
"""Measurements remembered; the median of so many shrugs off a compilation or two."""


class PrefillPace:
    """Sizes prefill chunks from what steps have cost.

    `max_tokens` is the most that a step may prefill, `stall_s` how long the prefill part of a step may take while
    sequences decode. The runner gains nothing from less than `min_tokens`.
    """

    def __init__(self, max_tokens: int, *, stall_s: float, min_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.min_tokens = min(min_tokens, max_tokens)
        self._stall_s = stall_s
        self._decode_s: deque[float] = deque(maxlen=_WINDOW)
        self._token_s: deque[float] = deque(maxlen=_WINDOW)

    def budget(self, *, num_decoding: int, num_prefilling: int) -> int:
        """Prompt tokens for the next step. Nothing measured yet: as few as make sense while sequences decode.

        Where more sequences wait for their first token than would stutter, the few wait for the many: up to
        `MAX_STRETCH` times the stall.
        """
        if num_decoding == 0:
            return self._idle_budget()
        stall_s = self._stall_s * min(MAX_STRETCH, max(1.0, num_prefilling / num_decoding))
        token_s = statistics.median(self._token_s) if self._token_s else self._stall_s
        affordable = int(min(self.max_tokens, stall_s / token_s)) if token_s > 0 else self.max_tokens
        return min(self.max_tokens, max(self.min_tokens, affordable))

    def _idle_budget(self) -> int:
        """All that a step may have, unless that has taken too long."""
        token_s = statistics.median(self._token_s) if self._token_s else 0.0
        affordable = min(self.max_tokens, IDLE_S / token_s) if token_s > 0 else self.max_tokens
        return min(self.max_tokens, max(MIN_IDLE_TOKENS, self.min_tokens, int(affordable)))

    def chunk(self, start: int, end: int, budget: int, *, page_size: int, is_first: bool) -> int:
        """Tokens of a chunk of start .. end - 1 in what is left of a step's budget; 0 if none is worth it.

        A chunk that does not reach the end goes up to a page boundary. The step's first chunk is never 0. Crumbs are
        not worth a step of their own: the last of a prompt goes with what is before it, and a piece that would only
        fill up the step is left for the next one.
        """
        limit = min(self.max_tokens, budget + self.min_tokens - 1) if is_first else budget
        if end - start <= limit:
            return end - start
        to_boundary = (start + budget) // page_size * page_size - start
        if to_boundary >= (1 if is_first else self.min_tokens):
            return to_boundary
        return budget if is_first else 0

    def observe(self, step: Step, elapsed_s: float) -> None:
        """Learn from a finished step: a prefill costs what its step took over a typical step without one."""
        if not step.prefills:
            if step.decodes:
                self._decode_s.append(elapsed_s)
            return
        num_tokens = sum(len(row.token_ids) for row in step.prefills)
        if num_tokens < self.min_tokens and self._token_s:
            return  # a short prompt's cost is mostly the step's own
        decode_s = statistics.median(self._decode_s) if step.decodes and self._decode_s else 0.0
        self._token_s.append(max(elapsed_s - decode_s, elapsed_s / 4) / num_tokens)
