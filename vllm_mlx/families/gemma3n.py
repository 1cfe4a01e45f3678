"""Gemma 3n: its last layers ask the caches of earlier ones for all their keys and values."""

from vllm_mlx.core.family import Family

FAMILY = Family(name="gemma3n", model_types=("gemma3n",), batched_decode=False)
