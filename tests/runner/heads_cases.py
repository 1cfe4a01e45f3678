"""What the kernel between projection and attention is tried on: ropes, heads, types and norms of the library."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from vllm_mlx.runner.head_modules import HeadModules
from vllm_mlx.runner.kernels.check import Check
from vllm_mlx.runner.kernels.heads import check_heads

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
    rope: nn.Module, backend: str, *, dim: int, dtype: str, norm_eps: float | None = None, heads: int = 4
) -> Check:
    """The self-check against the modules of the library."""
    norms = [nn.RMSNorm(dim, norm_eps) for _ in range(2)] if norm_eps is not None else []
    for i, norm in enumerate(norms):
        norm.weight = mx.random.uniform(0.5, 2, (dim,), key=mx.random.key(i)).astype(getattr(mx, dtype))
    modules = HeadModules(rope, norms)
    variant = modules.variant(heads=heads, kv_heads=2, dim=dim, dtype=getattr(mx, dtype))
    return check_heads(variant, backend, rates=modules.rates, norms=modules.norms, plain=modules.plain(variant))
