"""The prompts that were asked lately, to find out what a new one has in common with them."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

MAX_PROMPTS = 64
MAX_BYTES = 32 * 1024 * 1024
"""Of token ids, over all prompts: eight million tokens."""
NUM_BEFORE = 32
NUM_AFTER = 64
"""Tokens around a difference that are looked at."""
_ID_BYTES = 4


class Outline(msgspec.Struct, frozen=True):
    """Which parts of a prompt are the same as another's; 16 bytes each, empty for a part that is absent."""

    salt: bytes = b""
    """Prompts of another salt are never compared: what others asked is nobody's business."""
    tools: bytes = b""
    system: bytes = b""
    opening: bytes = b""
    """The first message that is not system text."""

    def num_shared(self, other: Outline) -> int:
        """How many parts both have, and have in common."""
        mine, its = (self.tools, self.system, self.opening), (other.tools, other.system, other.opening)
        return sum(one == two != b"" for one, two in zip(mine, its, strict=True))


def part_key(text: str) -> bytes:
    """What stands for the text of a part in an `Outline`."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest() if text else b""


class Nearest(msgspec.Struct, frozen=True):
    """The earlier prompt that has the longest beginning in common with a new one, and what follows in both."""

    num_common: int
    outline: Outline
    before_ids: tuple[int, ...]
    """The last tokens in common."""
    given_ids: tuple[int, ...]
    """The next tokens of the new prompt; empty if it ends there."""
    earlier_ids: tuple[int, ...]
    """The next tokens of the earlier one, its answer included; empty if it ends there."""


@dataclass(slots=True)
class _Prompt:
    outline: Outline
    ids: bytearray
    last: bytes = b""
    """The answer's last token so far. It is computed, and so remembered, only when another follows."""


class SeenPrompts:
    """Keeps token ids of the latest prompts and their answers, bounded in number and bytes. No text is kept.

    Comparing a prompt of 100,000 tokens with 64 others takes a few milliseconds at most.
    """

    def __init__(self, *, max_prompts: int = MAX_PROMPTS, max_bytes: int = MAX_BYTES) -> None:
        self._max_prompts = max_prompts
        self._max_bytes = max_bytes
        self._prompts: dict[str, _Prompt] = {}
        self.size_bytes = 0
        """Bytes of token ids that are kept."""

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, name: str, token_ids: Sequence[int], outline: Outline) -> None:
        """Keep a prompt under a name of its own. It replaces earlier ones that it begins with."""
        ids = bytearray(_packed(token_ids))
        for other, prompt in list(self._prompts.items()):
            if other == name or (prompt.outline.salt == outline.salt and ids.startswith(prompt.ids)):
                self._drop(other)
        self._prompts[name] = _Prompt(outline, ids)
        self.size_bytes += len(ids)
        self._trim()

    def extend(self, name: str, token_ids: Sequence[int]) -> None:
        """More tokens of the answer to a prompt; ignored if it is not kept any more. The very last one is left out."""
        prompt = self._prompts.get(name)
        if prompt is not None and token_ids:
            more = prompt.last + array("i", token_ids).tobytes()
            prompt.ids += more[:-_ID_BYTES]
            prompt.last = more[-_ID_BYTES:]
            self.size_bytes += len(more) - _ID_BYTES
            self._trim()

    def nearest(self, token_ids: Sequence[int], outline: Outline, *, page_size: int) -> Nearest | None:
        """The kept prompt of the same salt with the longest beginning in common, the latest of several.

        Beginnings of less than a page are chance: among those, the one with most parts in common.
        """
        ids = _packed(token_ids)
        best, best_rank = None, (0, 0, 0)
        for prompt in reversed(self._prompts.values()):
            if prompt.outline.salt != outline.salt:
                continue
            num_common = _num_common(ids, prompt.ids)
            rank = (num_common if num_common >= page_size else 0, outline.num_shared(prompt.outline), num_common)
            if rank > best_rank:
                best, best_rank = prompt, rank
        if best is None:
            return None
        num_best = best_rank[2]
        return Nearest(
            num_common=num_best,
            outline=best.outline,
            before_ids=_slice(ids, num_best - NUM_BEFORE, num_best),
            given_ids=_slice(ids, num_best, num_best + NUM_AFTER),
            earlier_ids=_slice(best.ids, num_best, num_best + NUM_AFTER),
        )

    def _trim(self) -> None:
        while len(self._prompts) > self._max_prompts or self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._prompts)))

    def _drop(self, name: str) -> None:
        self.size_bytes -= len(self._prompts.pop(name).ids)


def _packed(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"{len(token_ids)}i", *token_ids)  # twice as fast as an array


def _num_common(one: bytes, other: bytearray) -> int:
    """Tokens that both begin with. Halving: every byte is compared about twice, in C."""
    low, high = 0, min(len(one), len(other)) // _ID_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * _ID_BYTES : middle * _ID_BYTES] == other[low * _ID_BYTES : middle * _ID_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def _slice(ids: bytes | bytearray, start: int, end: int) -> tuple[int, ...]:
    found = array("i")
    found.frombytes(ids[max(0, start) * _ID_BYTES : end * _ID_BYTES])
    return tuple(found)
