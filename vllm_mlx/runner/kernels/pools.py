"""What the pools of a layer look like, for whoever builds kernels for them."""

from __future__ import annotations

import mlx.core as mx
import msgspec

from vllm_mlx.runner.kernels.packing import Packing, packing_of
from vllm_mlx.runner.kernels.variant import ELEMENT_BYTES


class PoolFormat(msgspec.Struct, frozen=True):
    """What pools of one kind look like: keys [kv_heads x pages x page_size, key_dim], values alike.

    Quantised, a token is a row of words uint32, and the scales of a page are a row of their own, float16
    [kv_heads x pages, page_size x scales per token].
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    page_size: int
    bits: int | None = None
    """Of a stored element where tokens are quantised: 8 or 4."""

    @property
    def packing(self) -> Packing | None:
        """How tokens are quantised, if they are.

        Raises:
            ValueError: the heads' elements do not divide into groups.
        """
        return None if self.bits is None else packing_of(self.bits, key_dim=self.key_dim, value_dim=self.value_dim)

    @property
    def raw(self) -> tuple[PoolFormat, ...]:
        """How the pools look to whom moves whole pages as they are: one format for tokens, and one for scales."""
        packing = self.packing
        if packing is None:
            return (self,)
        words = [packing.words(dim) for dim in (self.key_dim, self.value_dim)]
        scales = [self.page_size * packing.scales(dim) for dim in (self.key_dim, self.value_dim)]
        return (
            PoolFormat(self.kv_heads, words[0], words[1], "float32", self.page_size),
            PoolFormat(self.kv_heads, scales[0], scales[1], "float16", 1),
        )

    @property
    def chunk_words(self) -> int:
        """32-bit words that a thread moves at once.

        Raises:
            ValueError: a token is no whole number of words, or the type is unknown.
        """
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"no page kernels for {self.dtype}")
        sizes = [dim * ELEMENT_BYTES[self.dtype] for dim in (self.key_dim, self.value_dim)]
        for words in (4, 2, 1):
            if not any(size % (4 * words) for size in sizes):
                return words
        raise ValueError(f"no page kernels for heads of {self.key_dim} and {self.value_dim} elements")

    def chunks(self, dim: int) -> int:
        """Chunks of a token of `dim` elements."""
        return dim * ELEMENT_BYTES[self.dtype] // (4 * self.chunk_words)


def empty_pools(
    pools: PoolFormat, num_pages: int
) -> tuple[tuple[mx.array, mx.array], tuple[mx.array, mx.array] | None]:
    """Keys and values of `num_pages` pages, and their scales where they are quantised; all zero."""
    packing, dims, heads_pages = pools.packing, (pools.key_dim, pools.value_dim), pools.kv_heads * num_pages
    num_tokens = heads_pages * pools.page_size
    if packing is None:
        keys, values = (mx.zeros((num_tokens, dim), getattr(mx, pools.dtype)) for dim in dims)
        return (keys, values), None
    keys, values = (mx.zeros((num_tokens, packing.words(dim)), mx.uint32) for dim in dims)
    scales = [mx.zeros((heads_pages, pools.page_size * packing.scales(dim)), mx.float16) for dim in dims]
    return (keys, values), (scales[0], scales[1])
