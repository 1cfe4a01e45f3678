"""What bytes a token stands for, read from the tokenizer's own decoder."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tokenizers

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_Rule = Callable[[str], str | bytes]


class PieceDecoder(NamedTuple):
    """Turns the pieces of a vocabulary into bytes, one at a time: the text is the bytes in a row, read as UTF-8."""

    to_bytes: Callable[[str], bytes]
    strip_start: int
    """Spaces that are taken off the beginning of a whole text (SentencePiece's dummy prefix)."""


def piece_decoder(backend: tokenizers.Tokenizer) -> PieceDecoder:
    """The rules of `backend.decoder`, for one piece.

    Byte-level BPE, byte fallback and Metaspace are exact. Any other decoder is asked what a piece adds to a text,
    which is exact as long as it does not look further back than one token.
    """
    rules: list[_Rule] = []
    strip_start = 0
    for part in _flatten(backend.decoder):
        rule = _rule(part)
        if rule is not None:
            rules.append(rule)
        elif part["type"] == "Strip" and part["content"] == " " and part["stop"] == 0:
            strip_start = part["start"]
        elif part["type"] != "Fuse":
            return PieceDecoder(functools.partial(_difference, backend, _anchor(backend)), strip_start=1)
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            strip_start = 1
    if not rules:
        return PieceDecoder(functools.partial(_difference, backend, _anchor(backend)), strip_start=1)
    return PieceDecoder(functools.partial(_apply, tuple(rules)), strip_start)


def _flatten(decoder: Any) -> list[Mapping[str, Any]]:
    """The decoder's parts in order; none if there is no decoder."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _rule(part: Mapping[str, Any]) -> _Rule | None:
    """What a part of a decoder does to one piece; None if it does not work piece by piece."""
    match part:
        case {"type": "ByteLevel"}:
            return _byte_level
        case {"type": "ByteFallback"}:
            return _byte_fallback
        case {"type": "Metaspace", "replacement": old}:
            return functools.partial(_replace, old=old, new=" ")
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return functools.partial(_replace, old=old, new=new)
    return None


def _apply(rules: tuple[_Rule, ...], piece: str) -> bytes:
    value: str | bytes = piece
    for rule in rules:
        if isinstance(value, bytes):
            break
        value = rule(value)
    return value if isinstance(value, bytes) else value.encode()


def _replace(piece: str, *, old: str, new: str) -> str:
    return piece.replace(old, new)


def _byte_fallback(piece: str) -> str | bytes:
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes((int(found[1], 16),)) if found else piece


def _byte_level(piece: str) -> bytes:
    """GPT-2's byte alphabet; a piece with any other character (an added token) stands for itself."""
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


@functools.cache
def _byte_alphabet() -> Mapping[str, int]:
    """Character to byte: printable Latin-1 stands for itself, the other bytes are U+0100 onwards (GPT-2's encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _anchor(backend: tokenizers.Tokenizer) -> int:
    """A token that stands for plain text, to put before the token in question."""
    encoded: list[int] = backend.encode("a", add_special_tokens=False).ids
    return encoded[-1] if encoded else 0


def _difference(backend: tokenizers.Tokenizer, anchor: int, piece: str) -> bytes:
    token_id = backend.token_to_id(piece)
    if token_id is None:
        return b""
    before = backend.decode([anchor], skip_special_tokens=False)
    text = backend.decode([anchor, token_id], skip_special_tokens=False)
    return (text.removeprefix(before) if text.startswith(before) else piece).encode()
