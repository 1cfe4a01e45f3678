"""Paged attention for decoding: the two kernels as one function of MLX arrays."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx

from vllm_mlx.runner.kernels import source
from vllm_mlx.runner.kernels.variant import DecodeVariant, geometry


class PagedAttention:
    """The kernels of one variant, built for the GPU of this process.

    Raises:
        ValueError: the variant has no layout, or there is no GPU.
    """

    def __init__(self, variant: DecodeVariant, backend: str) -> None:
        self.variant = variant
        self._layout = geometry(variant)
        sinks = ("sinks",) if variant.has_sinks else ()
        decode = source.decode_text(variant, self._layout, backend)
        combine = source.combine_text(variant, backend)
        self._decode = _build("paged_decode", decode, source.DECODE_INPUTS, source.DECODE_OUTPUTS, backend)
        self._combine = _build("paged_combine", combine, (*source.COMBINE_INPUTS, *sinks), source.COMBINE_OUTPUTS, backend)

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        table: mx.array,
        items: mx.array,
        starts: mx.array,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention [rows, heads, num_queries, value_dim] of `queries` [rows, heads, num_queries, key_dim].

        `keys` and `values` are pools [kv_heads x pages x page_size, dim]; `table` int32 [rows, pages]; `items` and
        `starts` as in `DecodePlan`. The keys and values of the queries themselves are in the pools already.
        """
        variant, layout = self.variant, self._layout
        rows, num_items = queries.shape[0], items.shape[0]
        vectors = variant.heads * variant.num_queries
        partial, stats = self._decode(
            inputs=[queries, keys, values, table, items],
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


def _build(
    name: str, text: tuple[str, str], inputs: tuple[str, ...], outputs: tuple[str, ...], backend: str
) -> Any:
    header, body = text
    # MLX keeps compiled kernels by name, on CUDA also on disk: another text must have another name.
    digest = hashlib.sha256(f"{header}\0{body}\0{inputs}".encode()).hexdigest()[:16]
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    return make(
        name=f"{name}_{digest}", input_names=list(inputs), output_names=list(outputs), header=header, source=body
    )
