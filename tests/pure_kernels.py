"""The GPU's kernels as functions: pools are never changed, what they would hold travels in the write token.

So a compiled step can be run on any machine, and its result is right only if every read comes after the last write.
"""

from __future__ import annotations

from math import inf
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from vllm_mlx.runner.kernel_pages import Kernels
from vllm_mlx.runner.kernels.check import Check
from vllm_mlx.runner.kernels.heads import HeadsVariant
from vllm_mlx.runner.kernels.pools import PoolFormat
from vllm_mlx.runner.kernels.variant import DecodeVariant
from vllm_mlx.runner.layers import PAGE_SIZE


class Replay:
    """`mx.compile` without a compiler: a function is traced once per shapes and replayed from its exported graph."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.num_traces = 0
        self.num_replays = 0

    def __call__(self, function):
        known = {}

        def replayed(*args):
            flat = tree_flatten(args)
            key = tuple((path, array.shape, array.dtype) for path, array in flat)
            arrays = [array for _, array in flat]
            if key not in known:
                paths = [path for path, _ in flat]
                file = str(self._folder / f"{self.num_traces}.mlxfn")
                mx.export_function(
                    file, lambda *leaves: function(*tree_unflatten(list(zip(paths, leaves, strict=True)))), *arrays
                )
                known[key] = mx.import_function(file)
                self.num_traces += 1
            self.num_replays += 1
            return known[key](*arrays)

        return replayed


class Contents:
    """Where the contents of each pool are in the token, float32 [all of them]."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}
        self._pools: list[mx.array] = []
        """Kept, so that no other array gets their identity."""

    def get(self, pool: mx.array, token: mx.array) -> mx.array:
        start = self._start(pool)
        return self._whole(token)[start : start + pool.size].reshape(pool.shape)

    def put(self, pool: mx.array, new: mx.array, token: mx.array) -> mx.array:
        start, token = self._start(pool), self._whole(token)
        return mx.concatenate([token[:start], new.reshape(-1), token[start + pool.size :]])

    def _start(self, pool: mx.array) -> int:
        if id(pool) not in self._starts:
            self._starts[id(pool)] = sum(known.size for known in self._pools)
            self._pools.append(pool)
        return self._starts[id(pool)]

    def _whole(self, token: mx.array) -> mx.array:
        missing = sum(pool.size for pool in self._pools) - token.size
        return mx.concatenate([token.astype(mx.float32), mx.zeros((missing,))]) if missing > 0 else token


class PurePages:
    def __init__(self, pools: PoolFormat, contents: Contents) -> None:
        self._pools = pools
        self._contents = contents

    def write(self, key_pool, value_pool, keys, values, *, slots, after, scales=None):
        heads = self._pools.kv_heads
        index = mx.arange(heads)[:, None] * (key_pool.shape[0] // heads) + slots[None]
        for pool, source in ((key_pool, keys), (value_pool, values)):
            new = self._contents.get(pool, after)
            new[index] = source.swapaxes(0, 1).reshape(heads, -1, source.shape[-1])
            after = self._contents.put(pool, new, after)
        return after

    def read(self, pool, table, *, after, scales=None):
        return pages_of(self._contents.get(pool, after), table, self._pools.kv_heads, self._pools.page_size)


class PureAttention:
    def __init__(self, variant: DecodeVariant, contents: Contents) -> None:
        self._variant = variant
        self._contents = contents

    def __call__(self, queries, keys, values, *, table, slots, items, starts, after, sinks=None, scales=None):
        variant, rows = self._variant, queries.shape[0]
        keys, values = (
            mx.repeat(
                pages_of(self._contents.get(pool, after), table[slots], variant.kv_heads, variant.page_size),
                variant.group,
                axis=1,
            )
            for pool in (keys, values)
        )
        row, begin, end, position = (items[None, :, i : i + 1] for i in range(4))
        tokens, number = mx.arange(keys.shape[2])[None, None], mx.arange(items.shape[0])[None, :, None]
        own = (number >= starts[:-1, None, None]) & (number < starts[1:, None, None])
        own = own & (row == mx.arange(rows)[:, None, None])
        seen = own & (tokens >= begin) & (tokens < end) & (tokens > position - (variant.window or keys.shape[2]))
        seen = mx.any(seen, axis=1)[:, None, None]
        scores = mx.where(seen, variant.scale * queries @ keys.swapaxes(-1, -2), -inf)
        column = mx.full((variant.heads,), -1e30) if sinks is None else sinks
        column = mx.broadcast_to(column.reshape(1, -1, 1, 1), (rows, variant.heads, 1, 1))
        return mx.softmax(mx.concatenate([scores, column], axis=-1), axis=-1)[..., :-1] @ mx.where(
            seen.swapaxes(-1, -2), values, 0
        )


class PureHeads:
    def __init__(self, variant: HeadsVariant, contents: Contents) -> None:
        self._variant = variant
        self._pages = PurePages(
            PoolFormat(variant.kv_heads, variant.dim, variant.dim, variant.dtype, PAGE_SIZE), contents
        )

    def __call__(self, joined, key_pool, value_pool, *, positions, slots, rates, norms, after):
        variant = self._variant
        heads = joined.reshape(joined.shape[0], -1, 1, variant.dim)
        parts = mx.split(heads, [variant.heads, variant.heads + variant.kv_heads], axis=1)
        turned = [
            mx.fast.rope(
                (part if variant.norm_eps is None else mx.fast.rms_norm(part, norms[i], variant.norm_eps))
                * mx.where(mx.arange(variant.dim) < variant.rotary_dims, variant.factor, 1.0),
                variant.rotary_dims,
                traditional=variant.is_traditional,
                base=None,
                scale=1.0,
                offset=positions,
                freqs=1 / rates,
            )
            for i, part in enumerate(parts[:2])
        ]
        after = self._pages.write(key_pool, value_pool, turned[1], parts[2], slots=slots, after=after)
        return turned[0].reshape(joined.shape[0], 1, -1), after


class PureKernels(Kernels):
    def __init__(self) -> None:
        super().__init__("pure")
        self._contents = Contents()

    @property
    def waits_for_memory(self) -> bool:
        """So that tests send a step's numbers as on CUDA."""
        return True

    def check(self, variant: DecodeVariant) -> Check:
        return Check("pure", None)

    def pages(self, pools: PoolFormat) -> PurePages:
        return PurePages(pools, self._contents)

    def decode(self, variant: DecodeVariant) -> PureAttention:
        return PureAttention(variant, self._contents)

    def check_heads(self, variant: HeadsVariant, **_) -> Check:
        return Check("pure", None)

    def heads(self, variant: HeadsVariant) -> PureHeads:
        return PureHeads(variant, self._contents)


def pages_of(pool: mx.array, table: mx.array, heads: int, page_size: int) -> mx.array:
    """[rows, heads, tokens, dim] of the pages `table` [rows, pages]."""
    pages = pool.reshape(heads, -1, page_size, pool.shape[-1])[:, table]
    return pages.swapaxes(0, 1).reshape(table.shape[0], heads, -1, pool.shape[-1])
