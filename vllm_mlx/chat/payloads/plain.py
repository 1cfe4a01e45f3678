"""Calls whose whole body is one text, written as it is."""

from __future__ import annotations

import json

from vllm_mlx.chat.payloads.actions import Arguments, CallOpen, Parsing
from vllm_mlx.chat.payloads.markers import Markers
from vllm_mlx.chat.payloads.reader import Reader


def read_plain_call(
    reader: Reader, opening: CallOpen, argument: str, *, ends: Markers, next_marks: tuple[str, ...]
) -> Parsing[None]:
    """The text up to one of its ends, as the one argument of that name. Ends that begin what follows are put back."""
    pieces = []
    while True:
        piece, end = reader.advance(ends)
        pieces.append(piece)
        if end in next_marks:
            reader.give_back(end)
        if end or reader.is_over:
            break
        yield None
    yield opening
    yield Arguments(json.dumps({argument: "".join(pieces)}, ensure_ascii=False))
