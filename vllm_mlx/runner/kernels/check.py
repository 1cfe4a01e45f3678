"""Before a kernel is trusted: run it once on random data and compare with plain operations.

A kernel that does not compile, or whose result differs, is not used: an untested GPU may be slower, never wrong.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import msgspec
import numpy as np

from vllm_mlx.core.errors import one_line
from vllm_mlx.runner.kernels import reference
from vllm_mlx.runner.kernels.decode import PagedAttention
from vllm_mlx.runner.kernels.paging import PageKernels
from vllm_mlx.runner.kernels.plan import PADDED, num_items, plan_items
from vllm_mlx.runner.kernels.pools import PoolFormat, empty_pools
from vllm_mlx.runner.kernels.variant import DecodeVariant

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 6e-3}
"""Largest relative error in norm: a few times what the types themselves cost."""
POSITIONS = (0, 1, 40, 300, 700, PADDED)
"""Of the rows tried: shorter than a page, exact pages, several items, and padding."""


class Check(msgspec.Struct, frozen=True):
    """How a kernel fared."""

    name: str
    problem: str | None
    """Why it is not used; None if it is."""
    error: float = 0.0
    """Relative, in norm."""


def check_decode(variant: DecodeVariant, backend: str) -> Check:
    """Compile and run the kernels for a variant, writing through the page kernels."""
    name = _describe(variant)
    try:
        error = _decode_error(variant, backend)
    except (ValueError, RuntimeError) as failure:  # no layout, or the compiler's own words
        return Check(name, one_line(failure)[:500])
    if not error <= TOLERANCES[variant.dtype]:  # NaN is no number to be under
        return Check(name, f"differs from plain operations by {error:.1e} (relative)", error)
    return Check(name, None, error)


def pool_format(variant: DecodeVariant) -> PoolFormat:
    """The pools that a variant reads."""
    return PoolFormat(
        variant.kv_heads, variant.key_dim, variant.value_dim, variant.dtype, variant.page_size, variant.bits
    )


def _decode_error(variant: DecodeVariant, backend: str) -> float:
    """Relative error of the kernels on random rows; infinite if a pool that was written does not read back."""
    random = np.random.default_rng(0)
    pages, paging = _random_tables(variant, random), PageKernels(pool_format(variant), backend)
    num_pages = 1 + sum(len(table) for table in pages)
    dtype = getattr(mx, variant.dtype)
    keys, values = (
        mx.array(random.standard_normal((variant.kv_heads, num_pages * variant.page_size, dim), np.float32)).astype(
            dtype
        )
        for dim in (variant.key_dim, variant.value_dim)
    )
    stored = _write(variant, paging, keys, values, random)
    if stored is None:
        return float("inf")
    shape = (len(POSITIONS), variant.heads, variant.num_queries, variant.key_dim)
    queries = mx.array(random.standard_normal(shape, np.float32)).astype(dtype)
    sinks = mx.array(random.standard_normal(variant.heads, np.float32)).astype(dtype) if variant.has_sinks else None
    out = _run(variant, backend, queries, stored, pages, sinks).astype(mx.float32)
    flat = [array.reshape(-1, array.shape[-1]) for array in stored.contents]
    expected = reference.attention(variant, queries, *flat, tables=pages, positions=POSITIONS, sinks=sinks)
    difference = mx.linalg.norm((out - expected).reshape(-1)) / mx.linalg.norm(expected.reshape(-1))
    error: Any = difference.item()
    return float(error)


class _Stored(NamedTuple):
    """Pools that were written by a kernel."""

    pools: tuple[mx.array, mx.array]
    scales: tuple[mx.array, mx.array] | None
    contents: tuple[mx.array, mx.array]
    """Keys and values [heads, tokens, dim] as they are found in there."""
    after: mx.array


def _write(
    variant: DecodeVariant, paging: PageKernels, keys: mx.array, values: mx.array, random: np.random.Generator
) -> _Stored | None:
    """Write every token of every page, from a source in another order; None if it does not read back."""
    formats, num_tokens = pool_format(variant), keys.shape[1]
    pools, scales = empty_pools(formats, num_tokens // variant.page_size)
    mx.eval(pools, scales or ())
    order = random.permutation(num_tokens).astype(np.int32)
    sources = [array[:, mx.array(order)][None] for array in (keys, values)]
    none = mx.zeros((1,), mx.int32)
    after = paging.write(*pools, *sources, slots=mx.array(order), after=none, scales=scales)
    table = mx.array(np.arange(num_tokens // variant.page_size, dtype=np.int32)[None])
    reads = [
        paging.read(pool, table, after=after, scales=scale)[0]
        for pool, scale in zip(pools, scales or (None, None), strict=True)
    ]
    mx.eval(reads)
    if scales is None:
        is_right = all(mx.array_equal(read, array).item() for read, array in zip(reads, (keys, values), strict=True))
        return _Stored(pools, None, (keys, values), after) if is_right else None
    contents = _unpacked(formats, pools, scales)
    is_right = all(
        _is_near(read, found) and _is_quantised(array, found, formats)
        for read, array, found in zip(reads, (keys, values), contents, strict=True)
    )
    return _Stored(pools, scales, contents, after) if is_right else None


def _unpacked(
    formats: PoolFormat, pools: tuple[mx.array, mx.array], scales: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    """What plain operations find in pools, float32 [heads, tokens, dim]."""
    packing = formats.packing
    assert packing is not None
    by_head = [
        packing.unpack(pool, scale.reshape(pool.shape[0], -1), mx.float32).reshape(formats.kv_heads, -1, dim)
        for pool, scale, dim in zip(pools, scales, (formats.key_dim, formats.value_dim), strict=True)
    ]
    return by_head[0], by_head[1]


def _is_near(read: mx.array, found: mx.array) -> bool:
    """Whether a kernel read what is there, as near as its type is."""
    limit = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[read.dtype]
    return bool(mx.all(mx.abs(read.astype(mx.float32) - found) <= limit * (1 + mx.abs(found))).item())


def _is_quantised(array: mx.array, found: mx.array, formats: PoolFormat) -> bool:
    """Whether all elements are at most a little more than half a step of their group away."""
    packing = formats.packing
    assert packing is not None
    groups, near = (each.astype(mx.float32).reshape(*array.shape[:2], -1, packing.group) for each in (array, found))
    low, high = mx.min(groups, axis=-1, keepdims=True), mx.max(groups, axis=-1, keepdims=True)
    step = mx.maximum(-low, high) / 127 if packing.bits == 8 else (high - low) / 15
    return bool(mx.all(mx.abs(groups - near) <= 0.52 * step + 4e-3).item())


def _run(
    variant: DecodeVariant,
    backend: str,
    queries: mx.array,
    stored: _Stored,
    pages: list[list[int]],
    sinks: mx.array | None,
) -> mx.array:
    slots = np.arange(len(pages), dtype=np.int32)[::-1].copy()
    table = np.zeros((len(pages), max(map(len, pages))), np.int32)
    for slot, ids in zip(slots, pages, strict=True):
        table[slot, : len(ids)] = ids
    plan = plan_items(
        np.asarray(POSITIONS, np.int32),
        capacity=num_items(len(pages), kv_heads=variant.kv_heads),
        page_size=variant.page_size,
        num_queries=variant.num_queries,
        window=variant.window,
    )
    return PagedAttention(variant, backend)(
        queries,
        *stored.pools,
        table=mx.array(table),
        slots=mx.array(slots),
        items=mx.array(plan.items),
        starts=mx.array(plan.starts),
        after=stored.after,
        sinks=sinks,
        scales=stored.scales,
    )


def _random_tables(variant: DecodeVariant, random: np.random.Generator) -> list[list[int]]:
    """Pages of the rows, all different, in no order; page 0 belongs to nobody."""
    counts = [
        -(-(position + variant.num_queries) // variant.page_size) if position >= 0 else 0 for position in POSITIONS
    ]
    ids = (1 + random.permutation(sum(counts))).tolist()
    starts = np.cumsum([0, *counts])
    return [ids[start : start + count] for start, count in zip(starts, counts, strict=False)]


def _describe(variant: DecodeVariant) -> str:
    dims = f"{variant.key_dim}" if variant.key_dim == variant.value_dim else f"{variant.key_dim}/{variant.value_dim}"
    extras = [
        f"window {variant.window}" if variant.window else "",
        "sinks" if variant.has_sinks else "",
        f"{variant.num_queries} queries" if variant.num_queries > 1 else "",
        f"int{variant.bits} pages" if variant.bits else "",
    ]
    words = [f"decode {dims}", f"{variant.heads}/{variant.kv_heads} heads", variant.dtype, *filter(None, extras)]
    return ", ".join(words)
