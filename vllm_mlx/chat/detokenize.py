"""Token ids to text while they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence, Set

from vllm_mlx.chat.tokenizer import Tokenizer

_CONTEXT_TOKENS = 4
"""A character has at most four bytes, so no earlier token can be a part of one that is still open."""


class Detokenizer:
    """Turns tokens into text one at a time, in constant time each.

    Whole characters only: bytes wait until their character is complete, and what can never become UTF-8 is U+FFFD.
    The pieces in a row equal the text of all tokens at once. Hidden tokens are not shown.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, context: Sequence[int] = (), hidden_ids: Set[int] | None = None
    ) -> None:
        """`context` are the tokens before: with them the text goes on where they ended, its leading space kept.

        `hidden_ids` are the tokens that are not shown; all special tokens if not given.
        """
        self._tokenizer = tokenizer
        self._hidden_ids = tokenizer.special_ids if hidden_ids is None else hidden_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_strip = 0 if context else tokenizer.strip_start
        for token_id in context[-_CONTEXT_TOKENS:]:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """The characters that this token completes; often all of its own, sometimes none."""
        if token_id in self._hidden_ids:
            return ""
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        return self._strip(text) if self._num_strip and text else text

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True)

    def _strip(self, text: str) -> str:
        """Take off the spaces that a text must not begin with; `_num_strip` counts those still to come."""
        kept = text.lstrip(" ")
        num_spaces = min(len(text) - len(kept), self._num_strip)
        self._num_strip = 0 if kept else self._num_strip - num_spaces
        return text[num_spaces:]
