"""What the kernels must compute, in plain MLX operations and float32."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from vllm_mlx.runner.kernels.variant import DecodeVariant


def attention(
    variant: DecodeVariant,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    tables: Sequence[Sequence[int]],
    positions: Sequence[int],
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention float32 [rows, heads, num_queries, value_dim], row by row.

    `tables[i]` are the pages of row i, `positions[i]` is where its first query stands; a row at -1 gives zeros.
    """
    rows = []
    for i, (table, position) in enumerate(zip(tables, positions, strict=True)):
        if position < 0:
            rows.append(mx.zeros((variant.heads, variant.num_queries, variant.value_dim)))
            continue
        length = position + variant.num_queries
        row_keys, row_values = (_tokens(variant, pool, table, length) for pool in (keys, values))
        rows.append(_attend(variant, queries[i].astype(mx.float32), row_keys, row_values, position, sinks))
    return mx.stack(rows)


def _tokens(variant: DecodeVariant, pool: mx.array, table: Sequence[int], length: int) -> mx.array:
    """Float32 [kv_heads, length, dim] of one row."""
    pages = pool.reshape(variant.kv_heads, -1, variant.page_size, pool.shape[-1])[:, mx.array(list(table))]
    return pages.reshape(variant.kv_heads, -1, pool.shape[-1])[:, :length].astype(mx.float32)


def _attend(
    variant: DecodeVariant, queries: mx.array, keys: mx.array, values: mx.array, position: int, sinks: mx.array | None
) -> mx.array:
    grouped = queries.reshape(variant.kv_heads, variant.group, variant.num_queries, variant.key_dim)
    # Products and sums, not matmul: GPUs may multiply float32 matrices with fewer bits.
    scores = variant.scale * mx.sum(grouped[:, :, :, None] * keys[:, None, None], axis=-1)
    if variant.softcap is not None:
        scores = variant.softcap * mx.tanh(scores / variant.softcap)
    asked = position + mx.arange(variant.num_queries)[:, None]
    tokens = mx.arange(keys.shape[1])[None]
    seen = tokens <= asked
    if variant.window is not None:
        seen = seen & (tokens > asked - variant.window)
    scores = mx.where(seen, scores, -float("inf"))
    if sinks is not None:
        column = sinks.astype(mx.float32).reshape(variant.kv_heads, variant.group, 1, 1)
        scores = mx.concatenate([scores, mx.broadcast_to(column, (*scores.shape[:-1], 1))], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., : keys.shape[1]]
    out = mx.sum(weights[..., None] * values[:, None, None], axis=-2)
    return out.reshape(variant.heads, variant.num_queries, variant.value_dim)
