"""What `serve` prints once, when requests are taken."""

from __future__ import annotations

import json
import shlex

from vllm_mlx import __version__
from vllm_mlx.core.config import Config
from vllm_mlx.core.step import RunnerInfo

QUESTION = "What is the capital of France?"
_GIB = 2**30


def banner(config: Config, info: RunnerInfo, *, url: str) -> str:
    """The whole text, ending with a command to paste."""
    rows = [
        ("URL", f"{url}/v1"),
        ("Model", config.model_name),
        ("Context", f"{info.max_model_len:,} tokens"),
        ("Runs on", f"{info.backend} ({info.device}), {info.dtype}"),
        ("Memory", _memory(info)),
        *(("Kernels" if number == 0 else "", line) for number, line in enumerate(_kernels(info))),
        *(("", note) for note in info.notes),
        *(("", note) for note in _warnings(config)),
    ]
    table = "\n".join(f"  {name:<9}{value}" for name, value in rows)
    return f"\nvllm-mlx {__version__} is ready\n\n{table}\n\n{curl(config, url)}\n"


def curl(config: Config, url: str) -> str:
    """A command that asks the model something; the key stays in the environment."""
    message = {"role": "user", "content": QUESTION}
    body = json.dumps({"model": config.model_name, "messages": [message], "temperature": 0}, ensure_ascii=False)
    key = ' \\\n  -H "Authorization: Bearer $VLLM_MLX_API_KEY"' if config.api_key else ""
    return (
        f"curl {url}/v1/chat/completions \\\n"
        f"  -H 'Content-Type: application/json'{key} \\\n"
        f"  -d {shlex.quote(body)}"
    )


def _memory(info: RunnerInfo) -> str:
    weights = f"weights {info.memory.weights / _GIB:.2f} GiB"
    if not info.num_pages:
        return f"{weights}; KV rows are taken as needed"
    usable = info.num_pages - 1
    size = usable * info.cache.page_bytes / _GIB
    groups = info.cache.page_groups
    if not groups.has_windows and len(groups.windows) == 1:
        return f"{weights}, KV cache {size:.2f} GiB = {usable * info.cache.page_size:,} tokens"
    # Tokens that a window does not show any more take no room: how many fit depends on the sequences.
    num_sequences = usable / groups.pages_for(info.max_model_len)
    return f"{weights}, KV cache {size:.2f} GiB = {num_sequences:,.1f} sequences of {info.max_model_len:,} tokens"


def _kernels(info: RunnerInfo) -> list[str]:
    """A line for each kernel that the model needs; if one failed, none is used."""
    if all(kernel.problem is None for kernel in info.kernels):
        return [f"{kernel.name}: checked" for kernel in info.kernels]
    return [f"not used: {kernel.name}: {kernel.problem}" for kernel in info.kernels if kernel.problem is not None]


def _warnings(config: Config) -> list[str]:
    if config.host in ("127.0.0.1", "localhost", "::1") or config.api_key:
        return []
    return ["open to the network without a key; --api-key sets one"]
