"""A kernel between a layer's merged projection and its attention: one launch in place of four to six.

Of the queries, keys and values of a token, which lie side by side in the product, the heads of queries and keys are
normalised where the model does so and turned by the token's position (RoPE, Su et al. 2021). Then keys and values go
into their pages, as by the write kernel of `paging`, and queries into an array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import msgspec

from vllm_mlx.core.errors import one_line
from vllm_mlx.runner.kernels.check import TOLERANCES, Check
from vllm_mlx.runner.kernels.dialect import build, header, literal, opening

WARPS = 4
INPUTS = ("joined", "positions", "slots", "rates", "key_pool", "value_pool", "after")
NORM_INPUTS = ("query_norm", "key_norm")
OUTPUTS = ("queries", "done")
TRIED = (0, 3, 700)
"""Positions."""
PlainHeads = Callable[[mx.array, mx.array | int], tuple[mx.array, ...]]
"""(product, positions) to queries, keys and values [rows, heads, 1, dim]: what a kernel is compared with."""

# joined [rows, 1, ALL_HEADS x DIM]: heads of queries, then of keys, then of values; a warp computes one of them. rates
# [PAIRS]: radians that a pair of elements turns per position.
BODY = r"""
  const int vector = block_x * WARPS + warp, row = vector / ALL_HEADS, head = vector % ALL_HEADS;
  if (row < joined_shape[0]) {
    const size_t from = size_t(vector) * DIM, pool_rows = key_pool_shape[0] / KV_HEADS;
    const bool is_query = head < HEADS, is_value = head >= HEADS + KV_HEADS;
    const size_t pool_head = is_query ? 0 : is_value ? head - HEADS - KV_HEADS : head - HEADS;
    const size_t to = (is_query ? size_t(row) * HEADS + head : pool_head * pool_rows + slots[row]) * DIM;
    DEVICE TYPE* target = (DEVICE TYPE*)queries;
    if (!is_query) target = is_value ? (DEVICE TYPE*)value_pool : (DEVICE TYPE*)key_pool;
    float x[PER_LANE];
    UNROLL for (int i = 0; i < PER_LANE; ++i) x[i] = ELEMENT(i) < DIM ? float(joined[from + ELEMENT(i)]) : 0.f;
#if HAS_NORMS
    if (!is_value) {
      float squares = 0.f;
      UNROLL for (int i = 0; i < PER_LANE; ++i) squares += x[i] * x[i];
      UNROLL for (int o = 16; o > 0; o /= 2) squares += SIMD_XOR(squares, o);
      const float factor = RSQRT(squares / DIM + EPS);
      UNROLL for (int i = 0; i < PER_LANE; ++i) {
        const int at = min(ELEMENT(i), DIM - 1);
        const float weight = is_query ? float(query_norm[at]) : float(key_norm[at]);
        x[i] = float(TYPE(float(TYPE(x[i] * factor)) * weight));  // rounded where MLX rounds
      }
    }
#endif
    if (!is_value) {
#ifdef FACTOR_BEFORE
      UNROLL for (int i = 0; i < TURNED; ++i) x[i] = float(TYPE(x[i] * FACTOR_BEFORE));
#endif
      UNROLL for (int i = 0; i < TURNED; i += 2) {
        const float angle = float(positions[row]) * rates[min(i / 2 * 32 + lane, PAIRS - 1)];
        const float cosine = COS(angle), sine = SIN(angle), first = x[i], second = x[i + 1];
        x[i] = first * cosine - second * sine;
        x[i + 1] = first * sine + second * cosine;
      }
    }
    UNROLL for (int i = 0; i < PER_LANE; ++i) {
      if (ELEMENT(i) < DIM) target[to + ELEMENT(i)] = TYPE(x[i]);
    }
  }
  if (vector == 0 && lane == 0) done[0] = after[0];
"""

# Which element of a head a lane has as its i-th: first pairs that turn, both of a pair; then the others. DIM: none.
ELEMENTS = r"""
INLINE int element_of(int i, int lane) {
  if (i >= TURNED) {
    const int other = 2 * PAIRS + (i - TURNED) * 32 + lane;
    return other < DIM ? other : DIM;
  }
  const int pair = i / 2 * 32 + lane;
  if (pair >= PAIRS) return DIM;
  return IS_TRADITIONAL ? 2 * pair + i % 2 : pair + i % 2 * PAIRS;
}
#define ELEMENT(i) element_of(i, lane)
"""


class HeadsVariant(msgspec.Struct, frozen=True):
    """What the kernel is compiled for."""

    heads: int
    """Of queries."""
    kv_heads: int
    dim: int
    """Elements of a head, the same for keys and values."""
    dtype: str
    """'float32', 'float16' or 'bfloat16'."""
    rotary_dims: int
    """Elements of a head that turn, from the first on: even."""
    is_traditional: bool
    """Neighbours turn together; otherwise an element of the first half and one of the second."""
    factor: float = 1.0
    """Of the elements that turn, before they do (YaRN)."""
    norm_eps: float | None = None
    """Of the root mean square norm of each head of queries and keys; None: there is none."""


def heads_text(variant: HeadsVariant, backend: str) -> tuple[str, str]:
    """Header and body; `backend` is 'metal' or 'cuda'."""
    pairs = variant.rotary_dims // 2
    turned = 2 * -(-pairs // 32)
    constants: dict[str, int | str] = {
        "HEADS": variant.heads,
        "KV_HEADS": variant.kv_heads,
        "ALL_HEADS": variant.heads + 2 * variant.kv_heads,
        "DIM": variant.dim,
        "PAIRS": pairs,
        "TURNED": turned,
        "PER_LANE": turned + -(-(variant.dim - variant.rotary_dims) // 32),
        "IS_TRADITIONAL": int(variant.is_traditional),
        "HAS_NORMS": int(variant.norm_eps is not None),
        "EPS": literal(variant.norm_eps or 0.0),
        "WARPS": WARPS,
        **({} if variant.factor == 1.0 else {"FACTOR_BEFORE": literal(variant.factor)}),
    }
    return header(variant.dtype, backend, constants, ELEMENTS), opening(backend) + BODY


class HeadsKernel:
    """The kernel of one variant.

    Raises:
        ValueError: there is no GPU.
    """

    def __init__(self, variant: HeadsVariant, backend: str) -> None:
        self._variant = variant
        inputs = (*INPUTS, *(() if variant.norm_eps is None else NORM_INPUTS))
        text = heads_text(variant, backend)
        self._kernel = build("place_heads", text, inputs=inputs, outputs=OUTPUTS, backend=backend)

    def __call__(
        self,
        joined: mx.array,
        key_pool: mx.array,
        value_pool: mx.array,
        *,
        positions: mx.array,
        slots: mx.array,
        rates: mx.array,
        norms: tuple[mx.array, ...],
        after: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """Queries [rows, 1, heads x dim] and the token of the write into the pools [kv_heads x pages x page_size, dim].

        `joined` [rows, 1, (heads + 2 kv_heads) x dim] is the product; `positions` and `slots` int32 [rows] say where
        its tokens stand in their sequences and in a head's part of the pools; `rates` float32 [rotary_dims / 2] are
        radians per position; `norms` are the weights [dim] of queries and keys, if there are any; `after` as for
        writes.
        """
        variant, rows = self._variant, joined.shape[0]
        num_vectors = rows * (variant.heads + 2 * variant.kv_heads)
        queries, done = self._kernel(
            inputs=[joined, positions, slots, rates, key_pool, value_pool, after, *norms],
            output_shapes=[(rows, 1, variant.heads * variant.dim), (1,)],
            output_dtypes=[joined.dtype, mx.int32],
            grid=(-(-num_vectors // WARPS) * WARPS * 32, 1, 1),
            threadgroup=(WARPS * 32, 1, 1),
        )
        return queries, done


def check_heads(
    variant: HeadsVariant,
    backend: str,
    *,
    rates: mx.array,
    norms: tuple[mx.array, ...],
    plain: PlainHeads,
) -> Check:
    """Run the kernel on random data and compare with what the model's own modules, `plain`, make of it."""
    dim_text = f"{variant.dim}" if variant.rotary_dims == variant.dim else f"{variant.rotary_dims}/{variant.dim}"
    extra = "" if variant.norm_eps is None else ", normalised"
    name = f"heads {dim_text}, {variant.heads}/{variant.kv_heads} heads, {variant.dtype}{extra}"
    try:
        error = _error(variant, backend, rates, norms, plain)
    except (ValueError, RuntimeError) as failure:
        return Check(name, one_line(failure)[:500])
    limit = max(TOLERANCES[variant.dtype], 1e-4)  # angles are products of a rounded rate
    problem = None if error <= limit else f"differs from plain operations by {error:.1e} (relative)"
    return Check(name, problem, error)


def _error(
    variant: HeadsVariant,
    backend: str,
    rates: mx.array,
    norms: tuple[mx.array, ...],
    plain: PlainHeads,
) -> float:
    """The largest relative error, in norm, of queries, keys and values."""
    rows, width = len(TRIED), (variant.heads + 2 * variant.kv_heads) * variant.dim
    dtype = getattr(mx, variant.dtype)
    joined = mx.random.normal((rows, 1, width), key=mx.random.key(0)).astype(dtype)
    positions, slots = mx.array(TRIED, dtype=mx.int32), mx.array([5, 0, 2], dtype=mx.int32)
    pools = [mx.zeros((variant.kv_heads * 6, variant.dim), dtype) for _ in range(2)]
    mx.eval(joined, positions, slots, pools)
    queries, after = HeadsKernel(variant, backend)(
        joined,
        *pools,
        positions=positions,
        slots=slots,
        rates=rates,
        norms=norms,
        after=mx.zeros((1,), mx.int32),
    )
    mx.eval(queries, after)
    stored = [pool.reshape(variant.kv_heads, 6, variant.dim)[:, slots].swapaxes(0, 1) for pool in pools]
    found = [queries.reshape(rows, variant.heads, variant.dim), *stored]
    return max(_distance(one, other) for one, other in zip(found, plain(joined, positions), strict=True))


def _distance(found: mx.array, expected: mx.array) -> float:
    expected = expected.astype(mx.float32).reshape(-1)
    difference: Any = mx.linalg.norm(found.astype(mx.float32).reshape(-1) - expected) / mx.linalg.norm(expected)
    return float(difference.item())
