"""The GPU's kernels from plain operations, so that what surrounds them can be run on any machine.

They take the same arrays, change pools in place like the real ones, and check what they are told.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from vllm_mlx.runner.kernel_pages import Kernels
from vllm_mlx.runner.kernels import reference
from vllm_mlx.runner.kernels.check import Check
from vllm_mlx.runner.kernels.heads import HeadsVariant
from vllm_mlx.runner.kernels.pools import PoolFormat
from vllm_mlx.runner.kernels.variant import DecodeVariant


class PlainPages:
    def __init__(self, pools: PoolFormat) -> None:
        self._pools = pools

    def write(self, key_pool, value_pool, keys, values, *, slots, after, scales=None):
        heads, packing = self._pools.kv_heads, self._pools.packing
        index = mx.arange(heads)[:, None] * (key_pool.shape[0] // heads) + slots[None]
        for i, (pool, source) in enumerate(((key_pool, keys), (value_pool, values))):
            assert source.shape[1] == heads
            rows = source.swapaxes(0, 1).reshape(heads, -1, source.shape[-1])
            if packing is None:
                assert source.dtype == pool.dtype
                pool[index] = rows
            else:
                assert str(source.dtype).endswith(self._pools.dtype)
                by_token = scales[i].reshape(pool.shape[0], -1)
                pool[index], by_token[index] = packing.pack(rows)
                scales[i][:] = by_token.reshape(scales[i].shape)
        return mx.depends(after + 1, [key_pool, value_pool, *(scales or ())])

    def read(self, pool, table, *, after, scales=None):
        if self._pools.packing is not None:
            dtype = getattr(mx, self._pools.dtype)
            pool = self._pools.packing.unpack(pool, scales.reshape(pool.shape[0], -1), dtype)
        by_page = pool.reshape(self._pools.kv_heads, -1, self._pools.page_size, pool.shape[-1])
        pages = by_page[:, table].swapaxes(0, 1)
        return pages.reshape(table.shape[0], self._pools.kv_heads, -1, pool.shape[-1]) + 0 * after[0].astype(pool.dtype)


class PlainAttention:
    def __init__(self, variant: DecodeVariant) -> None:
        self._variant = variant

    def __call__(self, queries, keys, values, *, table, slots, items, starts, after, sinks=None, scales=None):
        if scales is not None:
            keys, values = (
                self._variant.packing.unpack(pool, scale.reshape(pool.shape[0], -1), queries.dtype)
                for pool, scale in zip((keys, values), scales, strict=True)
            )
        assert queries.dtype == keys.dtype == values.dtype, "a kernel reads one type"
        positions = [-1] * queries.shape[0]
        items, starts = np.array(items), np.array(starts)
        for row in range(queries.shape[0]):
            own = items[starts[row] : starts[row + 1]]
            if len(own):
                assert (own[:, 0] == row).all()
                assert (own[1:, 1] == own[:-1, 2]).all(), "items leave a gap"
                positions[row] = int(own[0, 3])
                assert own[-1, 2] == positions[row] + self._variant.num_queries
        tables = np.array(table)[np.array(slots)]
        lengths = [-(-(position + 1) // self._variant.page_size) for position in positions]
        tables = [row[:length].tolist() for row, length in zip(tables, lengths, strict=True)]
        out = reference.attention(self._variant, queries, keys, values, tables=tables, positions=positions, sinks=sinks)
        return out.astype(queries.dtype)


class PlainKernels(Kernels):
    def __init__(self, *, broken: bool = False, plans: bool = False) -> None:
        super().__init__("plain")
        self._broken = broken
        self._plans = plans

    @property
    def waits_for_memory(self) -> bool:
        """So that tests send a step's numbers as on CUDA."""
        return True

    @property
    def plans_attention(self) -> bool:
        return self._plans

    def check(self, variant: DecodeVariant) -> Check:
        return Check("plain", "made to fail" if self._broken else None)

    def check_heads(self, variant: HeadsVariant, **_) -> Check:
        return Check("plain", "has no such kernel")

    def pages(self, pools: PoolFormat) -> PlainPages:
        return PlainPages(pools)

    def decode(self, variant: DecodeVariant) -> PlainAttention:
        return PlainAttention(variant)
