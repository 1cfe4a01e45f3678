"""A prompt is encoded piece by piece, and pieces that were seen before are not encoded again.

A conversation comes back with every turn, a little longer. Encoding all of it anew costs a tenth of a second and more
for long ones, before anything is computed. Tokenizers look for added tokens (`<|im_start|>`) in a text before anything
else, and treat what is between two of them alone: so a text may be cut in front of one, and the pieces be kept. Chat
templates put one at the beginning of most messages.

What the latest texts begin with is kept as a whole besides: making numbers of a hundred thousand tokens takes
milliseconds, too.
"""

from __future__ import annotations

import itertools
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import tokenizers

from vllm_mlx.chat.beginnings import Beginnings
from vllm_mlx.core.kept import Kept

MAX_KEPT_BYTES = 32 * 1024 * 1024
"""Of pieces and their tokens: a few million tokens."""
ENTRY_BYTES = 400
"""What keeping a piece costs besides."""
MIN_CHARS = 256
"""Of a piece: below it, keeping costs more than encoding."""
NUM_FIRST = 3
"""Characters by which places are found where an added token may begin."""


class Piece(NamedTuple):
    """What is kept of a piece of text."""

    ids: array[int]
    largest_id: int
    """0 if there is none."""


class Segments:
    """A text as tokens, the same as those of the text as a whole, and where it was cut."""

    def __init__(self, text: str, encoder: SegmentEncoder) -> None:
        self._encoder = encoder
        self._text = text
        pieces = list(encoder.pieces(text))
        found = list(encoder.encode_pieces(pieces))
        self._starts = [0, *itertools.accumulate(map(len, pieces))][:-1]
        self._num_before = [0, *itertools.accumulate(len(piece.ids) for piece in found)][:-1]
        self.token_ids: tuple[int, ...] = encoder.beginnings.join(pieces, [piece.ids for piece in found])
        self.largest_id = max(piece.largest_id for piece in found)
        """Of the tokens; 0 if there are none."""

    def position(self, length: int) -> int:
        """How many tokens the first `length` characters are; 0 if they do not end between two tokens."""
        place = bisect_right(self._starts, length) - 1
        if place < 0:
            return 0
        before = self._num_before[place]
        rest = self._encoder.encode(self._text[self._starts[place] : length])
        end = before + len(rest)
        return end if self.token_ids[before:end] == rest else 0


class SegmentEncoder:
    """Encodes texts without adding tokens to them. Safe to use from threads."""

    def __init__(self, backend: tokenizers.Tokenizer, *, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        """For a tokenizer to which no tokens are added any more."""
        self._backend = backend
        self._kept: Kept[str, Piece] = Kept(max_kept_bytes, weigh=_num_bytes)
        self.beginnings = Beginnings()
        # Those that are looked for in the raw text: the first that matches is taken, of several there the longest.
        added = backend.get_added_tokens_decoder().values()
        self._added = {token.content: token for token in added if token.content and not token.normalized}
        self._lengths = sorted({len(content) for content in self._added}, reverse=True)
        firsts = sorted({re.escape(content[:NUM_FIRST]) for content in self._added})
        self._may_begin = re.compile("|".join(firsts)) if firsts else None

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that is not worth keeping. The GIL is released while it runs."""
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def encode_pieces(self, pieces: list[str]) -> Iterator[Piece]:
        """Tokens of each piece, of those that are not known all at once."""
        found = [self._kept.get(piece) for piece in pieces]
        missing = [text for text, piece in zip(pieces, found, strict=True) if piece is None]
        encoded = iter(self._backend.encode_batch_fast(missing, add_special_tokens=False) if missing else ())
        for text, piece in zip(pieces, found, strict=True):
            if piece is None:
                ids = next(encoded).ids
                piece = Piece(array("I", ids), max(ids, default=0))
                self._kept.add(text, piece)
            yield piece

    def pieces(self, text: str) -> Iterator[str]:
        """The text, cut in front of added tokens; where, depends on nothing behind the cut but that token."""
        start = 0
        for cut in self._cuts(text):
            if cut - start >= MIN_CHARS:
                yield text[start:cut]
                start = cut
        yield text[start:]

    def _cuts(self, text: str) -> Iterator[int]:
        """Where added tokens begin that do not look at what is on their left."""
        if self._may_begin is None:
            return
        end = 0
        while (candidate := self._may_begin.search(text, end)) is not None:
            start = candidate.start()
            token = self._added_at(text, start)
            end = start + (1 if token is None else len(token.content))
            if token is not None and not token.lstrip and not token.single_word:
                yield start

    def _added_at(self, text: str, start: int) -> tokenizers.AddedToken | None:
        found = (self._added.get(text[start : start + length]) for length in self._lengths)
        return next((token for token in found if token is not None), None)


def _num_bytes(text: str, piece: Piece) -> int:
    return ENTRY_BYTES + len(text.encode("utf-8", "surrogatepass")) + piece.ids.itemsize * len(piece.ids)
