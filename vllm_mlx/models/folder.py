"""Is a folder a whole model? Every failure names the file at fault and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vllm_mlx.core.errors import ModelError
from vllm_mlx.models import shards

INDEX = "model.safetensors.index.json"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "*.tiktoken",
)


def check_folder(folder: Path, *, trust_remote_code: bool = False, needs_tokenizer: bool = True) -> None:
    """Raise ModelError unless `folder` has a config.json, all its weights as safetensors, and a tokenizer if needed."""
    config = _check_config(folder)
    if config.get("model_file") is not None and not trust_remote_code:
        raise ModelError(
            f"{folder}: the model runs its own code ({config['model_file']}); "
            "read it, and start with --trust-remote-code if you trust it."
        )
    for path in _weight_files(folder):
        shards.check_file(path)
    if needs_tokenizer:
        _check_tokenizer(folder)


def is_whole(folder: Path) -> bool:
    """Whether `check_folder` has nothing to complain about."""
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ModelError if it cannot be read as one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON ({error}); download the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object; download the model again.")
    return value


def _check_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(_why_no_config(folder))
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: has no model_type; this is not a model for mlx-lm.")
    return config


def _why_no_config(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if found:
        return f"{folder}: holds GGUF files; name one of them: {', '.join(str(folder / name) for name in found)}"
    if (folder / "adapter_config.json").exists():
        return f"{folder}: is an adapter, not a model (adapter_config.json without config.json)."
    return f"{folder}: has no config.json; give the folder of a model in Hugging Face's or MLX's layout."


def _weight_files(folder: Path) -> list[Path]:
    """Every file that the weights are spread over, all of them present."""
    found = sorted(folder.glob("model*.safetensors"))
    for name in sorted(_indexed_files(folder) | _numbered_files(found)):
        if not (folder / name).exists():
            raise ModelError(f"{folder / name}: is missing, the weights are not complete; download the model again.")
    if found:
        return found
    others = sorted(
        path.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    hint = f" (there are {', '.join(others[:3])})" if others else ""
    raise ModelError(f"{folder}: has no weights named model*.safetensors{hint}; convert the model with mlx_lm.convert.")


def _indexed_files(folder: Path) -> set[str]:
    path = folder / INDEX
    if not path.exists():
        return set()
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{path}: has no weight_map; download the model again.")
    return set(files.values())


def _numbered_files(found: list[Path]) -> set[str]:
    """The names `model-0000i-of-0000n` that the names found imply."""
    names: set[str] = set()
    for path in found:
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)\.safetensors", path.name):
            width, count = len(match[2]), int(match[3])
            names |= {f"{match[1]}{i:0{width}d}-of-{match[3]}.safetensors" for i in range(1, min(count, 10_000) + 1)}
    return names


def _check_tokenizer(folder: Path) -> None:
    found = [path for pattern in TOKENIZERS for path in folder.glob(pattern)]
    if not found:
        raise ModelError(f"{folder}: has no tokenizer (tokenizer.json or tokenizer.model); download the model again.")
    for path in found:
        if path.stat().st_size == 0:
            raise ModelError(f"{path}: is empty; download the model again.")
