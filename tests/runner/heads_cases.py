"""What the kernel between projection and attention is tried on: ropes, heads, types and norms of the library."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from vllm_mlx.runner.fused_heads import rotation_of
from vllm_mlx.runner.kernels.check import Check
from vllm_mlx.runner.kernels.heads import HeadsVariant, check_heads

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HALVES = nn.RoPE(128, base=500_000)
HEADS_LIMITS = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 3e-3}
HEADS_CASES = [
    (HALVES, 128, "bfloat16", None),
    (HALVES, 128, "float16", 1e-6),
    (Llama3RoPE(64, base=500_000, scaling_config=LLAMA3), 64, "float32", None),
    (nn.RoPE(64, traditional=True), 64, "bfloat16", 1e-5),
    (nn.RoPE(80, base=10_000), 80, "float32", 1e-5),
    (nn.RoPE(96, scale=0.25), 96, "float16", None),
    (nn.RoPE(40, traditional=True), 80, "float32", 1e-5),
    (nn.RoPE(64), 256, "bfloat16", 1e-6),
    (nn.RoPE(256), 256, "float32", None),
    (YarnRoPE(64, base=150_000, scaling_factor=32.0), 64, "bfloat16", None),
]
"""Rope, elements of a head, type, and epsilon of the norm."""


def check_against(
    rope: nn.Module, backend: str, *, dim: int, dtype: str, norm_eps: float | None = None, **changes: Any
) -> Check:
    """The self-check against the modules of the library."""
    rotation = rotation_of(rope)
    assert rotation is not None
    fields = {"heads": 4, "kv_heads": 2, "dim": dim, "dtype": dtype, "norm_eps": norm_eps} | changes
    turning = {
        "rotary_dims": rotation.dims,
        "is_traditional": rotation.is_traditional,
        "factor": mx.array(rotation.factor, getattr(mx, dtype)).item(),
    }
    variant = HeadsVariant(**turning, **fields)
    weights = [mx.random.uniform(0.5, 2, (dim,), key=mx.random.key(i)).astype(getattr(mx, dtype)) for i in range(2)]
    norms = () if norm_eps is None else tuple(weights)

    def plain(joined: mx.array, positions: mx.array) -> tuple[mx.array, ...]:
        every = joined.reshape(joined.shape[0], -1, 1, dim)
        parts = mx.split(every, [variant.heads, variant.heads + variant.kv_heads], axis=1)
        for i, weight in enumerate(norms):
            parts[i] = mx.fast.rms_norm(parts[i], weight, norm_eps)
        return rope(parts[0], offset=positions), rope(parts[1], offset=positions), parts[2]

    return check_heads(variant, backend, rates=rotation.rates, norms=norms, plain=plain)
