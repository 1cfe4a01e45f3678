"""Paged attention from its definition, in float64, and batches to try kernels on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from runner.metal.emulator import as_numpy

from vllm_mlx.runner.kernels.plan import PADDED
from vllm_mlx.runner.kernels.variant import DecodeVariant

Array = NDArray[Any]
LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 3e-3}
"""Largest relative error in norm of a row."""


@dataclass(frozen=True)
class Batch:
    """Rows on pages that lie anywhere in a pool. What no row may see is NaN: page 0, the rest of last pages, and what
    has left a row's window."""

    positions: Array
    """Of each row's first query; `PADDED` for rows without any."""
    queries: mx.array
    """[rows, heads, num_queries, key_dim]."""
    keys: mx.array
    values: mx.array
    """[kv_heads x pages x page_size, dim]; of quantised pools, what they hold."""
    table: Array
    """[slots, pages]; 0 where a slot has no page."""
    slots: Array
    """Row -> slot."""
    sinks: mx.array | None
    pools: tuple[mx.array, mx.array]
    """What the kernels read: keys and values themselves, or words."""
    scales: tuple[mx.array, mx.array] | None
    """NaN where nothing may be seen."""


def make_batch(variant: DecodeVariant, positions: list[int], *, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    dtype = getattr(mx, variant.dtype)
    rows, page = len(positions), variant.page_size
    counts = [-(-(p + variant.num_queries) // page) if p != PADDED else 0 for p in positions]
    ids = (1 + rng.permutation(sum(counts) + 2)).tolist()
    table = np.zeros((rows + 2, max(counts) + 1), np.int32)
    slots = rng.permutation(rows + 2)[:rows].astype(np.int32)
    seen = np.zeros((sum(counts) + 3) * page, bool)
    for slot, count, position in zip(slots, counts, positions, strict=True):
        table[slot, :count] = [ids.pop() for _ in range(count)]
        if position != PADDED:
            tokens = np.arange(_first_seen(variant, position), position + variant.num_queries)
            seen[table[slot, tokens // page] * page + tokens % page] = True

    def pool(dim: int) -> mx.array:
        drawn = rng.standard_normal((variant.kv_heads, len(seen), dim))
        return mx.array(np.where(seen[:, None], drawn, np.nan).reshape(-1, dim), mx.float32).astype(dtype)

    keys, values = pool(variant.key_dim), pool(variant.value_dim)
    pools, scales = (keys, values), None
    if variant.packing is not None:
        packed = [variant.packing.pack(array) for array in pools]
        keys, values = (variant.packing.unpack(words, scale, mx.float32) for words, scale in packed)
        pools, scales = (packed[0][0], packed[1][0]), (packed[0][1], packed[1][1])
        assert mx.isnan(scales[0]).any()
    queries = rng.standard_normal((rows, variant.heads, variant.num_queries, variant.key_dim))
    return Batch(
        positions=np.array(positions, np.int32),
        queries=mx.array(queries, mx.float32).astype(dtype),
        keys=keys,
        values=values,
        table=table,
        slots=slots,
        sinks=mx.array(rng.standard_normal(variant.heads), mx.float32).astype(dtype) if variant.has_sinks else None,
        pools=pools,
        scales=scales,
    )


def attend(variant: DecodeVariant, batch: Batch) -> Array:
    """softmax(scale x queries x keys) x values [rows, heads, num_queries, value_dim], one query at a time."""
    out = np.zeros((len(batch.positions), variant.heads, variant.num_queries, variant.value_dim))
    queries, sinks = _wide(batch.queries), None if batch.sinks is None else _wide(batch.sinks)
    pools = [_wide(pool).reshape(variant.kv_heads, -1, pool.shape[1]) for pool in (batch.keys, batch.values)]
    for row, position in enumerate(batch.positions):
        if position == PADDED:
            continue
        for query in range(variant.num_queries):
            tokens = np.arange(_first_seen(variant, position + query), position + query + 1)
            places = batch.table[batch.slots[row], tokens // variant.page_size] * variant.page_size
            places += tokens % variant.page_size
            for head in range(variant.heads):
                keys, values = (pool[head // variant.group, places] for pool in pools)
                scores = variant.scale * keys @ queries[row, head, query]
                if variant.softcap is not None:
                    scores = variant.softcap * np.tanh(scores / variant.softcap)
                sink = -np.inf if sinks is None else sinks[head]
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                out[row, head, query] = weights @ values / (weights.sum() + np.exp(sink - top))
    return out


def errors(out: Array, expected: Array) -> list[float]:
    """Relative error in norm of every row; of a row that must be zero, its norm."""
    sizes = np.linalg.norm(expected.reshape(len(expected), -1), axis=1)
    differences = np.linalg.norm((widen(out) - expected).reshape(len(expected), -1), axis=1)
    return (differences / np.where(sizes == 0, 1, sizes)).tolist()


def widen(array: Array) -> Array:
    """float64 of floats; uint16 is bfloat16."""
    floats = (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
    return floats.astype(np.float64)


def _wide(array: mx.array) -> Array:
    return widen(as_numpy(array))


def _first_seen(variant: DecodeVariant, position: int) -> int:
    return 0 if variant.window is None else max(0, position + 1 - variant.window)
