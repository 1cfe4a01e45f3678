"""Gemma 2 (arXiv:2408.00118): its own attention with soft-capped scores [rows, kv_heads, group, tokens, keys]."""

from vllm_mlx.core.family import Family

FAMILY = Family(name="gemma2", model_types=("gemma2",), scores_rank=5)
