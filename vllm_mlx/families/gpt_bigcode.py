"""GPT-BigCode (arXiv:2301.03988): learned positions looked up with a plain integer offset."""

from vllm_mlx.core.family import Family

FAMILY = Family(name="gpt_bigcode", model_types=("gpt_bigcode",), batched_decode=False)
