"""Names of pages of prompts that came lately: who begins like one of them takes its names instead of hashing again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_mlx.core.prompt import BLOCK_TOKENS
from vllm_mlx.kv.blocks import TOKEN_BYTES, common_length, pack, packed_names

MAX_CHAINS = 16
MAX_TOKENS = 1 << 20
"""Of all chains together: some ten megabytes."""
MIN_PAGES = 16
"""What is shorter is soon hashed."""
WORTH = 8
"""What has less than one page in so many of its own is not kept: it would push out others, and is soon hashed."""


class _Chain(NamedTuple):
    salt: bytes
    blocks: tuple[int, ...]
    packed: bytes
    """The tokens of the pages that have names, see `pack`."""
    names: list[bytes]


class Chains:
    """The latest chains of names, for tokens in pages of `page_size`.

    Names are given out for as many pages as hold the very same tokens behind the same salt: those that hashing would
    give. Comparing costs a fifth of hashing, and next to nothing where prompts have blocks with numbers.
    """

    def __init__(self, *, page_size: int, max_chains: int = MAX_CHAINS, max_tokens: int = MAX_TOKENS) -> None:
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._max_chains = max_chains
        self._max_bytes = max_tokens * TOKEN_BYTES
        self._chains: list[_Chain] = []
        """The one used last comes last."""

    def __len__(self) -> int:
        return len(self._chains)

    def names(self, token_ids: Sequence[int], count: int, *, salt: bytes, blocks: tuple[int, ...] = ()) -> list[bytes]:
        """Names of the first `count` pages of these tokens; the list is the caller's own.

        `blocks` are those of their prompt, if it is known to have any.
        """
        size, page_bytes = self._page_size, self._page_bytes
        known, alike = self._alike(salt, blocks)
        known = min([known, count, *(len(each.names) for each in alike)])
        packed = pack(token_ids[known * size : count * size])
        chain, common = None, known
        for each in alike:
            found = known + _num_equal(each.packed, known * page_bytes, packed, page_bytes)
            if found > common or (chain is None and found):
                chain, common = each, found
            if (count - common) * WORTH <= count:
                break  # what another could have besides is soon hashed
        names = chain.names[:common] if chain is not None else []
        rest = packed[(common - known) * page_bytes :]
        names += packed_names(names[-1] if names else b"", rest, page_size=size, salt=salt)
        if chain is not None:
            self._chains.remove(chain)
        if chain is not None and (common < len(chain.names) or common == count):
            self._chains.append(chain)  # else it is a beginning of this one
        is_new = count >= MIN_PAGES and (count - common) * WORTH > count
        if is_new or (chain is not None and common == len(chain.names) < count):
            former = chain.packed[: common * page_bytes] if chain is not None else b""
            self._chains.append(_Chain(salt, blocks, former + rest, names[:]))
        self._trim()
        return names

    def _alike(self, salt: bytes, blocks: tuple[int, ...]) -> tuple[int, list[_Chain]]:
        """The chains that have the most blocks in common with these, and how many pages that is; the latest first."""
        most, found = 0, list[_Chain]()
        for each in reversed(self._chains):
            if each.salt != salt:
                continue
            count = common_length(each.blocks, blocks)
            if count > most:
                most, found = count, []
            if count == most:
                found.append(each)
            if blocks and most == len(blocks):
                break  # less than a block is left, which is soon hashed
        return most * BLOCK_TOKENS // self._page_size, found

    def _trim(self) -> None:
        """Forget what was used longest ago, if there is too much; the latest stays, however long."""
        while len(self._chains) > self._max_chains or (len(self._chains) > 1 and self._num_bytes > self._max_bytes):
            del self._chains[0]

    @property
    def _num_bytes(self) -> int:
        return sum(len(chain.packed) for chain in self._chains)


def _num_equal(ours: bytes, start: int, theirs: bytes, page_bytes: int) -> int:
    """Pages that are alike, in the one from `start` on, in the other from its beginning."""
    count, found, step = min(len(ours) - start, len(theirs)) // page_bytes, 0, 1
    while found < count and step:
        end = min(count, found + step)
        if ours[start + found * page_bytes : start + end * page_bytes] == theirs[found * page_bytes : end * page_bytes]:
            found, step = end, 2 * step
        else:
            step //= 2
    return found
