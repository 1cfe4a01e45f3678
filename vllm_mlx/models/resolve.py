"""From the model argument to a folder that mlx-lm can load."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.step import ProgressCallback
from vllm_mlx.models.folder import check_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelFiles(msgspec.Struct, frozen=True):
    """A model on disk: config.json, weights as safetensors and tokenizer files, all checked to be there."""

    path: Path
    name: str
    """The model argument as given."""
    source: str
    """'local', 'hub', 'gguf' or 'demo'."""


def resolve(config: Config, *, progress: ProgressCallback, needs_tokenizer: bool = True) -> ModelFiles:
    """Find, download or convert `config.model`; who works with token ids only needs no tokenizer in it.

    Raises ModelError with one line that says what is wrong and what to do.
    """
    name = config.model
    source = _source(name)
    if source != "hub" and config.revision is not None:
        raise ModelError(f"--revision is for Hugging Face models only; {name} is not one.")
    path = Path(name).expanduser()
    if source == "demo":
        from vllm_mlx.models.demo import demo_folder

        path = demo_folder(config, progress=progress)
    elif source == "gguf":
        from vllm_mlx.models.gguf_convert import converted_folder

        path = converted_folder(path.resolve(), config.cache_path, progress=progress)
    elif source == "hub":
        from vllm_mlx.models.hub import download

        path = download(config, progress=progress)
    check_folder(path, trust_remote_code=config.trust_remote_code, needs_tokenizer=needs_tokenizer)
    return ModelFiles(path=path, name=name, source=source)


def _source(name: str) -> str:
    """Which kind of model argument `name` is; raises ModelError if it is none."""
    if name == "demo":
        return "demo"
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return "local"
        if path.is_file():
            return _file_source(path)
    except OSError as error:
        raise ModelError(f"{name}: cannot be read ({error.strerror}).") from error
    if name.startswith((".", "/", "~")) or name.endswith((".gguf", "/")):
        raise ModelError(f"{name}: there is no such file or folder.")
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: is neither a folder here, nor a .gguf file, nor a Hugging Face id (owner/name).")
    return "hub"


def _file_source(path: Path) -> str:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return "gguf"
    raise ModelError(f"{path}: is a file that is not GGUF; give the model's folder instead.")
