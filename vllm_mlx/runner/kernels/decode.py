"""Paged attention for decoding: the two kernels as one function of MLX arrays."""

from __future__ import annotations

import mlx.core as mx

from vllm_mlx.runner.kernels import source
from vllm_mlx.runner.kernels.dialect import build
from vllm_mlx.runner.kernels.variant import DecodeVariant, geometry


class PagedAttention:
    """The kernels of one variant, built for the GPU of this process.

    Raises:
        ValueError: the variant has no layout, or there is no GPU.
    """

    def __init__(self, variant: DecodeVariant, backend: str) -> None:
        self.variant = variant
        self._layout = geometry(variant)
        combine_inputs = (*source.COMBINE_INPUTS, *(("sinks",) if variant.has_sinks else ()))
        self._decode = build(
            "paged_decode",
            source.decode_text(variant, self._layout, backend),
            inputs=(*source.DECODE_INPUTS, *(source.SCALE_INPUTS if variant.bits else ())),
            outputs=source.DECODE_OUTPUTS,
            backend=backend,
        )
        self._combine = build(
            "paged_combine",
            source.combine_text(variant, backend),
            inputs=combine_inputs,
            outputs=source.COMBINE_OUTPUTS,
            backend=backend,
        )

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        table: mx.array,
        slots: mx.array,
        items: mx.array,
        starts: mx.array,
        after: mx.array,
        sinks: mx.array | None = None,
        scales: tuple[mx.array, mx.array] | None = None,
    ) -> mx.array:
        """Attention [rows, heads, num_queries, value_dim] of `queries` [rows, heads, num_queries, key_dim].

        `keys` and `values` are pools [kv_heads x pages x page_size, dim], or of words where they are quantised, with
        the `scales` of both; `table` int32 [slots, pages] is the
        page table of every slot, `slots` int32 [rows] says whose row it is; `items` and `starts` as in `DecodePlan`.
        The keys and values of the queries themselves are in the pools already: `after` is the token of their write.
        """
        variant, layout = self.variant, self._layout
        rows, num_items = queries.shape[0], items.shape[0]
        vectors = variant.heads * variant.num_queries
        partial, stats = self._decode(
            inputs=[queries, keys, values, table, slots, items, after, *(scales or ())],
            output_shapes=[(num_items, vectors, variant.value_dim), (num_items, vectors, 2)],
            output_dtypes=[mx.float32, mx.float32],
            grid=(num_items * layout.threads, variant.kv_heads * layout.query_blocks, 1),
            threadgroup=(layout.threads, 1, 1),
        )
        threads = source.COMBINE_WARPS * 32
        (out,) = self._combine(
            inputs=[partial, stats, starts, *([] if sinks is None else [sinks])],
            output_shapes=[(rows, variant.heads, variant.num_queries, variant.value_dim)],
            output_dtypes=[queries.dtype],
            grid=(rows * vectors * threads, 1, 1),
            threadgroup=(threads, 1, 1),
        )
        result: mx.array = out
        return result
