"""Names of pages of prompts that came lately: who begins like one of them takes its names instead of hashing again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_mlx.core.prompt import BLOCK_TOKENS
from vllm_mlx.kv.blocks import common_length, page_names

MAX_CHAINS = 16
MAX_TOKENS = 1 << 19
"""Of all chains together: some five megabytes, beside the numbers themselves."""
PAGES_AT_ONCE = 32
"""That are compared in one go, before it is known that they differ."""
WORTH = 8
"""What has less than one page in so many of its own is not kept: it would push out others, and is soon hashed."""


class _Chain(NamedTuple):
    salt: bytes
    blocks: tuple[int, ...]
    token_ids: list[int]
    """Those of the pages that have names."""
    names: list[bytes]


class Chains:
    """The latest chains of names, for tokens in pages of `page_size`.

    Names are given out for as many pages as hold the very same tokens behind the same salt: those that hashing would
    give. To compare two tokens takes a hundredth of the time of hashing one.
    """

    def __init__(self, *, page_size: int, max_chains: int = MAX_CHAINS, max_tokens: int = MAX_TOKENS) -> None:
        self._page_size = page_size
        self._max_chains = max_chains
        self._max_tokens = max_tokens
        self._chains: list[_Chain] = []
        """The one used last comes last."""

    def __len__(self) -> int:
        return len(self._chains)

    def names(self, token_ids: Sequence[int], count: int, *, salt: bytes, blocks: tuple[int, ...] = ()) -> list[bytes]:
        """Names of the first `count` pages of these tokens; the list is the caller's own.

        `blocks` are those of their prompt, if it is known to have any.
        """
        tokens, size = token_ids if isinstance(token_ids, list) else list(token_ids), self._page_size
        chain, num_common = self._longest(tokens, count, salt, blocks)
        names = chain.names[:num_common] if chain is not None else []
        rest = tokens[num_common * size : count * size]
        names += page_names(names[-1] if names else b"", rest, page_size=size, salt=salt)
        if chain is not None:
            self._chains.append(self._chains.pop(self._chains.index(chain)))
        is_longer = chain is not None and num_common == len(chain.names) < count
        if is_longer:
            del self._chains[-1]  # it is a beginning of this one
        if is_longer or (count - num_common) * WORTH > count:
            self._chains.append(_Chain(salt, blocks, tokens[: count * size], names[:]))
            self._trim()
        return names

    def _longest(
        self, tokens: list[int], count: int, salt: bytes, blocks: tuple[int, ...]
    ) -> tuple[_Chain | None, int]:
        """A chain with the most of these pages in common, or nearly, and how many that are; the latest of several."""
        best, most = None, 0
        for chain in reversed(self._chains):
            if chain.salt == salt and (found := self._num_common(chain, tokens, count, blocks)) > most:
                best, most = chain, found
            if (count - most) * WORTH <= count:
                break  # what another could have besides is soon hashed
        return best, most

    def _num_common(self, chain: _Chain, tokens: list[int], count: int, blocks: tuple[int, ...]) -> int:
        """Pages that a chain has in common with the first `count` of these."""
        size, ours = self._page_size, chain.token_ids
        count = min(count, len(ours) // size)
        found = min(count, common_length(chain.blocks, blocks) * BLOCK_TOKENS // size)
        step = PAGES_AT_ONCE if found else 1  # the first page alone tells most chains apart
        while found < count and step:
            end = min(count, found + step)
            if ours[found * size : end * size] == tokens[found * size : end * size]:
                step = step if found else PAGES_AT_ONCE
                found = end
            else:
                step //= 2
        return found

    def _trim(self) -> None:
        """Forget what was used longest ago, if there is too much; the latest stays, however long."""
        while len(self._chains) > self._max_chains or (len(self._chains) > 1 and self._num_tokens > self._max_tokens):
            del self._chains[0]

    @property
    def _num_tokens(self) -> int:
        return sum(len(chain.token_ids) for chain in self._chains)
