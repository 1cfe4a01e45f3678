"""Inference server on Apple's MLX, and the same without HTTP: `from vllm_mlx import LLM, SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_mlx.core.sampling import SamplingParams
    from vllm_mlx.llm import LLM

__version__ = "1.0.0.dev0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Load the public classes on first use, so that `import vllm_mlx` costs nothing."""
    if name == "LLM":
        from vllm_mlx.llm import LLM

        return LLM
    if name == "SamplingParams":
        from vllm_mlx.core.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
