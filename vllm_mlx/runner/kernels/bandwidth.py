"""How fast this device moves keys and values: in plain copies, in the paged kernels, and in the library's attention.

Calls are chained in one graph, the output of each being the queries of the next, as the layers of a step are; they take
turns on pools that together are larger than any cache. The best of several rounds counts: machines are shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import mlx.core as mx
import msgspec
import numpy as np

from vllm_mlx.runner.kernels.decode import PagedAttention
from vllm_mlx.runner.kernels.plan import num_items, plan_items
from vllm_mlx.runner.kernels.variant import ELEMENT_BYTES, DecodeVariant

COPY_CALLS = 4
COPY_ROUNDS = 5
CPU_COPY_BYTES = 1 << 26
GPU_COPY_BYTES = 1 << 30
"""Size of the array that is copied."""
COPY_SHARE = 16
"""It takes at most one part in so many of the device's memory: the copies of a round are held together."""


class Effort(msgspec.Struct, frozen=True):
    """How long a measurement takes."""

    num_calls: int = 28
    """Chained in one graph; as many as a model of 3 billion parameters has layers."""
    num_rounds: int = 10
    min_bytes: int = 1 << 29
    """Least size of all keys and values together."""


FULL = Effort()


class Speed(msgspec.Struct, frozen=True):
    """What one call took."""

    call_s: float
    num_bytes: int
    """Keys and values that a call has to read."""
    num_tokens: int
    """Whose keys and values these are."""

    @property
    def bytes_per_s(self) -> float:
        """Keys and values read per second."""
        return self.num_bytes / self.call_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens attended to per second, all their KV heads."""
        return self.num_tokens / self.call_s


def copy_bandwidth(backend: str, memory_bytes: int) -> float:
    """Bytes per second, read and written together, of an elementwise operation on a large array.

    `memory_bytes` is what the device has; the array is made small enough for it.
    """
    size = min(CPU_COPY_BYTES if backend == "cpu" else GPU_COPY_BYTES, memory_bytes // COPY_SHARE) // 4 * 4
    source = mx.ones((size // 4,), mx.float32)
    call_s = _best_of(lambda: [source + 1 for _ in range(COPY_CALLS)], num_rounds=COPY_ROUNDS) / COPY_CALLS
    return 2 * size / call_s


def decode_bandwidth(
    variant: DecodeVariant, lengths: Sequence[int], backend: str, *, effort: Effort = FULL
) -> Speed | None:
    """Speed of the paged kernels on rows of `lengths` tokens, their queries included; None on a CPU, which has none.

    Raises:
        ValueError: there is no kernel for the variant.
        RuntimeError: it does not compile, or the device lacks the memory.
    """
    if backend == "cpu":
        return None
    attention = PagedAttention(variant, backend)
    pools = [_paged_pool(variant, lengths, seed=seed) for seed in range(_num_pools(variant, lengths, effort))]
    plan = plan_items(
        np.asarray(lengths, np.int32) - variant.num_queries,
        capacity=num_items(len(lengths), kv_heads=variant.kv_heads),
        page_size=variant.page_size,
        num_queries=variant.num_queries,
        window=variant.window,
    )
    items, starts, slots = mx.array(plan.items), mx.array(plan.starts), mx.arange(len(lengths), dtype=mx.int32)
    after, queries, sinks = mx.zeros((1,), mx.int32), _queries(variant, len(lengths)), _sinks(variant)
    mx.eval(items, starts, slots, after)

    def attend(x: mx.array, pool: _Pool) -> mx.array:
        return attention(
            x,
            pool.keys,
            pool.values,
            table=pool.table,
            slots=slots,
            items=items,
            starts=starts,
            after=after,
            sinks=sinks,
            scales=pool.scales,
        )

    return _measure(variant, lengths, lambda: _chain(variant, queries, pools, attend, effort), effort)


def library_bandwidth(variant: DecodeVariant, lengths: Sequence[int], *, effort: Effort = FULL) -> Speed | None:
    """Speed of MLX's own attention, without a mask, on keys and values that lie in one piece and are not quantised.

    None where it needs a mask: rows of unequal lengths, a window, several queries; or does not know a soft cap.
    """
    if len(set(lengths)) != 1 or variant.window or variant.num_queries > 1 or variant.softcap is not None:
        return None
    variant = msgspec.structs.replace(variant, bits=None)
    pools = [_whole_pool(variant, lengths, seed=seed) for seed in range(_num_pools(variant, lengths, effort))]
    queries, sinks = _queries(variant, len(lengths)), _sinks(variant)

    def attend(x: mx.array, pool: _Pool) -> mx.array:
        out: mx.array = mx.fast.scaled_dot_product_attention(
            x, pool.keys, pool.values, scale=variant.scale, sinks=sinks
        )
        return out

    return _measure(variant, lengths, lambda: _chain(variant, queries, pools, attend, effort), effort)


def kv_bytes(variant: DecodeVariant, lengths: Sequence[int]) -> int:
    """Size of the keys and values that rows of `lengths` tokens attend to, scales included."""
    dims, packing = (variant.key_dim, variant.value_dim), variant.packing
    if packing is None:
        token_bytes = sum(dims) * ELEMENT_BYTES[variant.dtype]
    else:
        token_bytes = sum(packing.token_bytes(dim) for dim in dims)
    return num_seen(variant, lengths) * variant.kv_heads * token_bytes


def num_seen(variant: DecodeVariant, lengths: Sequence[int]) -> int:
    """Tokens that rows of `lengths` tokens attend to."""
    return sum(length if variant.window is None else min(length, variant.window) for length in lengths)


class _Pool(NamedTuple):
    keys: mx.array
    values: mx.array
    table: mx.array
    """Pages int32 [rows, pages]; of no use where keys and values lie in one piece."""
    scales: tuple[mx.array, mx.array] | None = None
    """Of quantised keys and values."""


def _num_pools(variant: DecodeVariant, lengths: Sequence[int], effort: Effort) -> int:
    return max(1, min(effort.num_calls, -(-effort.min_bytes // kv_bytes(variant, lengths))))


def _paged_pool(variant: DecodeVariant, lengths: Sequence[int], *, seed: int) -> _Pool:
    """Pages in random order; page 0 belongs to nobody."""
    counts = [-(-length // variant.page_size) for length in lengths]
    ids = 1 + np.random.default_rng(seed).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(counts), max(counts)), np.int32)
    for row, own in enumerate(np.split(ids, np.cumsum(counts)[:-1])):
        table[row, : len(own)] = own
    num_tokens = variant.kv_heads * (1 + sum(counts)) * variant.page_size
    shapes = [(num_tokens, dim) for dim in (variant.key_dim, variant.value_dim)]
    return _quantised(variant, _random_pool(variant, shapes, mx.array(table), seed=seed))


def _whole_pool(variant: DecodeVariant, lengths: Sequence[int], *, seed: int) -> _Pool:
    shapes = [(len(lengths), variant.kv_heads, lengths[0], dim) for dim in (variant.key_dim, variant.value_dim)]
    return _random_pool(variant, shapes, mx.zeros((0,), mx.int32), seed=seed)


def _random_pool(variant: DecodeVariant, shapes: Sequence[tuple[int, ...]], table: mx.array, *, seed: int) -> _Pool:
    two = mx.random.split(mx.random.key(seed))
    keys, values = (_random(variant, shape, key=key) for shape, key in zip(shapes, two, strict=True))
    mx.eval(keys, values, table)
    return _Pool(keys, values, table)


def _quantised(variant: DecodeVariant, pool: _Pool) -> _Pool:
    """The same pool in the variant's packing."""
    packing = variant.packing
    if packing is None:
        return pool
    (keys, key_scales), (values, value_scales) = packing.pack(pool.keys), packing.pack(pool.values)
    mx.eval(keys, values, key_scales, value_scales)
    return _Pool(keys, values, pool.table, (key_scales, value_scales))


def _queries(variant: DecodeVariant, rows: int) -> mx.array:
    shape = (rows, variant.heads, variant.num_queries, variant.key_dim)
    queries = _random(variant, shape, key=mx.random.key(rows))
    mx.eval(queries)
    return queries


def _sinks(variant: DecodeVariant) -> mx.array | None:
    if not variant.has_sinks:
        return None
    sinks = mx.zeros((variant.heads,), getattr(mx, variant.dtype))
    mx.eval(sinks)
    return sinks


def _random(variant: DecodeVariant, shape: tuple[int, ...], *, key: mx.array) -> mx.array:
    array: mx.array = mx.random.normal(shape, dtype=getattr(mx, variant.dtype), key=key)
    return array


def _chain(
    variant: DecodeVariant,
    queries: mx.array,
    pools: Sequence[_Pool],
    attend: Callable[[mx.array, _Pool], mx.array],
    effort: Effort,
) -> list[mx.array]:
    """The graph of all calls."""
    x = queries
    for pool in islice(cycle(pools), effort.num_calls):
        x = attend(x, pool)
        if variant.value_dim < variant.key_dim:
            x = mx.pad(x, [(0, 0)] * 3 + [(0, variant.key_dim - variant.value_dim)])
        elif variant.value_dim > variant.key_dim:
            x = x[..., : variant.key_dim]
    return [x]


def _measure(
    variant: DecodeVariant, lengths: Sequence[int], build: Callable[[], list[mx.array]], effort: Effort
) -> Speed:
    call_s = _best_of(build, num_rounds=effort.num_rounds) / effort.num_calls
    return Speed(call_s, kv_bytes(variant, lengths), num_seen(variant, lengths))


def _best_of(build: Callable[[], list[mx.array]], *, num_rounds: int) -> float:
    """Seconds to compute what `build` describes. The first round, which compiles and allocates, does not count."""
    mx.eval(build())
    best_s = float("inf")
    for _ in range(num_rounds):
        outputs = build()
        begun = time.perf_counter()
        mx.eval(outputs)
        best_s = min(best_s, time.perf_counter() - begun)
        del outputs
    return best_s
