"""When a model has thought enough: its budget is spent, or it goes round in circles."""

from __future__ import annotations

import numpy as np

from vllm_mlx.chat.reasoning import ReasoningFormat

CLOSING_SENTENCE = "\n\nThat is enough thought; I answer with what I have.\n"
"""What reasoning that is ended by force ends with: models go on more sensibly than after half a word."""
MAX_PERIOD = 512
MIN_REPEATS = 4
MIN_CYCLE_TOKENS = 256
"""Text that repeats itself for less may be meant: a table, a list of equal values."""


def closing_text(form: ReasoningFormat) -> str | None:
    """What ends reasoning in this format; None if it has no mark for that."""
    if form.has_channels:
        return f"{CLOSING_SENTENCE}<|end|><|start|>assistant<|channel|>final<|message|>"
    return f"{CLOSING_SENTENCE}{form.closes[0]}\n\n" if form.closes else None


class CycleDetector:
    """Notices that the last tokens are one piece, of up to `MAX_PERIOD` tokens, over and over, token by token.

    For every period it counts how many tokens in a row equal the one a period before: constant work for a token.
    """

    def __init__(self) -> None:
        self._recent = np.full(MAX_PERIOD, -1, np.int64)
        """Tokens before, the newest last."""
        self._num_equal = np.zeros(MAX_PERIOD, np.int64)
        periods = np.arange(MAX_PERIOD, 0, -1)
        self._enough = np.maximum(periods * (MIN_REPEATS - 1), MIN_CYCLE_TOKENS - periods)

    def add(self, token_id: int) -> bool:
        """One more token; whether it completes enough repetitions."""
        self._num_equal += 1
        self._num_equal[self._recent != token_id] = 0
        self._recent[:-1] = self._recent[1:]
        self._recent[-1] = token_id
        return bool((self._num_equal >= self._enough).any())


class ThinkingLimit:
    """Decides for one choice when its reasoning ends by force; at most once.

    `max_tokens` is the budget, None for none. `closing_ids` are the tokens that end reasoning, and take their place
    among the `max_output` tokens of the answer.
    """

    def __init__(
        self,
        max_tokens: int | None,
        *,
        closing_ids: tuple[int, ...] = (),
        max_output: int | None = None,
        breaks_cycles: bool = True,
    ) -> None:
        self.closing_ids = closing_ids
        """What is put behind the last token of reasoning."""
        self._max_tokens = max_tokens
        self._max_output = max_output
        self._cycles = CycleDetector() if breaks_cycles else None
        self._num_tokens = 0
        self.is_used = False
        """Whether it has ended reasoning."""

    @property
    def is_spent(self) -> bool:
        """Whether no more reasoning may come."""
        return self._max_tokens is not None and self._num_tokens >= self._max_tokens

    def add(self, token_id: int, *, num_output: int) -> bool:
        """One more token of reasoning, the last of `num_output` generated; True if it was the last that may come."""
        self._num_tokens += 1
        is_cycle = self._cycles is not None and self._cycles.add(token_id)
        has_room = self._max_output is None or num_output + len(self.closing_ids) < self._max_output
        if self.is_used or not has_room or not (is_cycle or self.is_spent):
            return False
        self.is_used = True
        return True
