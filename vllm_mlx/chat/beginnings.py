"""Tokens of the latest long texts as a whole: who begins like one of them takes them over."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

from vllm_mlx.chat.volatile import num_common

MAX_TEXTS = 8
MAX_TOKENS = 1 << 19
"""Of all texts together: some twenty megabytes."""
MAX_TOKEN_CHARS = 16
"""On average: texts of longer tokens, rows of blanks most of them, would take more room than that."""
MIN_TOKENS = 2048
"""Of a text: numbers of fewer are soon made."""


class _Text(NamedTuple):
    pieces: Sequence[str]
    token_ids: tuple[int, ...]


class Beginnings:
    """The texts used last, in pieces, and their tokens. Safe to use from threads."""

    def __init__(self, *, max_texts: int = MAX_TEXTS, max_tokens: int = MAX_TOKENS) -> None:
        self._max_texts = max_texts
        self._max_tokens = max_tokens
        self._texts: tuple[_Text, ...] = ()
        """The latest comes last."""
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._texts)

    def join(self, pieces: Sequence[str], encoded: Sequence[array[int]]) -> tuple[int, ...]:
        """The tokens of all pieces, `encoded` one by one, in a row."""
        former, num_shared = self._nearest(pieces)
        num_known = sum(map(len, encoded[:num_shared]))
        rest = array("I")
        for ids in encoded[num_shared:]:
            rest.extend(ids)
        token_ids = (former.token_ids[:num_known] if former is not None else ()) + tuple(rest)
        is_bulky = sum(map(len, pieces)) > MAX_TOKEN_CHARS * len(token_ids)
        if MIN_TOKENS <= len(token_ids) <= self._max_tokens and not is_bulky:
            # The last piece of a text usually is another's beginning in the next one, which takes its place.
            is_goer_on = former is not None and num_shared >= len(former.pieces) - 1
            self._keep(_Text(pieces, token_ids), instead_of=former if is_goer_on else None)
        return token_ids

    def _nearest(self, pieces: Sequence[str]) -> tuple[_Text | None, int]:
        """The text that has the most pieces in common with these, and how many; the latest of several."""
        best, most = None, 0
        for text in reversed(self._texts):
            count = num_common(text.pieces, pieces)
            if count > most:
                best, most = text, count
            if most >= len(pieces) - 1:
                break
        return best, most

    def _keep(self, text: _Text, *, instead_of: _Text | None) -> None:
        with self._lock:
            texts = [*(each for each in self._texts if each is not instead_of), text][-self._max_texts :]
            num_tokens = sum(len(each.token_ids) for each in texts)
            while num_tokens > self._max_tokens:
                num_tokens -= len(texts.pop(0).token_ids)
            self._texts = tuple(texts)
