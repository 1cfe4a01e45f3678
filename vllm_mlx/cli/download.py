"""`vllm-mlx download MODEL`: everything that serving needs, fetched and converted now."""

from __future__ import annotations

from vllm_mlx.cli.display import Display
from vllm_mlx.core import log
from vllm_mlx.core.config import Config
from vllm_mlx.models.resolve import resolve


def download(config: Config) -> int:
    """Print the folder that the model is in. Raises ModelError if it cannot be had."""
    log.setup("warning")
    with Display() as progress:
        files = resolve(config, progress=progress)
    print(files.path)
    return 0
