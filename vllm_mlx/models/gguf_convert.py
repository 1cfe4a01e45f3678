"""From a .gguf file to a folder that mlx-lm loads: streamed tensor by tensor, kept in the cache."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.step import ProgressCallback
from vllm_mlx.models import gguf_blocks as blocks
from vllm_mlx.models.cache import make_once
from vllm_mlx.models.gguf_config import model_config
from vllm_mlx.models.gguf_file import GgufFile, TensorInfo, read_header, tensor_rows
from vllm_mlx.models.gguf_layout import Placement, placements
from vllm_mlx.models.gguf_tokenizer import Vocabulary, read_vocabulary, write_tokenizer
from vllm_mlx.models.shards import Tensor, write_shards

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
"""Part of a converted folder's name; raise it when the converter's output changes."""


def converted_folder(path: Path, cache: Path, *, progress: ProgressCallback) -> Path:
    """The folder made from the GGUF file `path`, converted now or earlier. Raises ModelError."""
    header = read_header(path)

    def build(folder: Path, _: Path) -> None:
        convert(header, folder, progress=progress)

    return make_once(cache, _folder_name(header), build, progress=progress)


def convert(file: GgufFile, folder: Path, *, progress: ProgressCallback) -> None:
    """Write config.json, weights and tokenizer of a GGUF file into an empty folder.

    Raises ModelError if anything in the file is not supported; everything is checked before a weight is written.
    """
    config = model_config(file)
    places = placements(file, config)
    vocabulary = read_vocabulary(file)
    if len(vocabulary.tokens) > config["vocab_size"]:
        raise file.refuse(f"has {len(vocabulary.tokens)} tokens, but embeddings for {config['vocab_size']} only.")
    tensors = [tensor for place in places for tensor in _tensors(file, place, config["torch_dtype"])]
    _check_space(folder, sum(tensor.size_bytes for tensor in tensors))
    write_shards(folder, tensors, written=functools.partial(progress, f"converting {file.path.name}"))
    write_tokenizer(vocabulary, folder, max_length=config["max_position_embeddings"])
    _write_config(folder, config | _quantization(places), vocabulary)


def _folder_name(file: GgufFile) -> str:
    """Readable, and another one whenever the file is: name, size, time of change and header go into it."""
    stat = file.path.stat()
    digest = hashlib.sha256(f"{file.path.name}\n{stat.st_size}\n{stat.st_mtime_ns}\n".encode())
    with file.path.open("rb") as source:
        digest.update(source.read(file.header_bytes))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.path.stem)[:60].strip(".-") or "model"
    return f"{stem}-{digest.hexdigest()[:12]}-v{FORMAT}"


def _tensors(file: GgufFile, place: Placement, dtype: str) -> list[Tensor]:
    """The arrays that one GGUF tensor becomes: three if it stays quantised, else one.

    Vectors are float32 in most files, and one such vector makes MLX compute in float32: they take the matrices'
    type where that changes no value.
    """
    info = place.info
    if len(info.shape) == 1 and dtype != "float32" and info.type_name == "F32":
        values = blocks.narrowed(_load(file, place, place.parameter).ravel(), dtype)
        if values is not None:
            return [Tensor(f"{place.module}.{place.parameter}", dtype, info.shape, lambda: values)]
    if _is_quantized(info):
        rows, columns = info.shape
        groups, bits = columns // blocks.GROUP_SIZE, blocks.BITS[info.type_name]
        parts: list[tuple[str, str, tuple[int, ...]]] = [
            ("weight", "uint32", (rows, columns * bits // 32)),
            ("scales", "float16", (rows, groups)),
            ("biases", "float16", (rows, groups)),
        ]
    else:
        parts = [(place.parameter, blocks.PLAIN[info.type_name], info.shape)]
    return [
        Tensor(f"{place.module}.{part}", dtype, shape, functools.partial(_load, file, place, part))
        for part, dtype, shape in parts
    ]


def _load(file: GgufFile, place: Placement, part: str) -> np.ndarray:
    info = place.info
    raw = tensor_rows(file, info)
    if place.permuted_heads is not None:
        # A vector is one row of the file; its values are what is interleaved.
        raw = raw.reshape(info.shape[0], -1)
        raw = blocks.unpermute(raw, place.permuted_heads)
    if not _is_quantized(info):
        return blocks.plain(raw, info.type_name)
    affine = blocks.Affine(raw, info.type_name)
    array = {"weight": affine.weight, "scales": affine.scales, "biases": affine.biases}[part]()
    if part != "weight" and not bool((abs(array) < float("inf")).all()):
        raise file.refuse(f"tensor {info.name} has scales that float16 cannot hold; take an F16 file of the model.")
    return array


def _is_quantized(info: TensorInfo) -> bool:
    return info.type_name in blocks.BITS


def _quantization(places: list[Placement]) -> dict[str, Any]:
    """The `quantization` entry: the commonest width for all, and every module that has another one."""
    bits = {place.module: blocks.BITS[place.info.type_name] for place in places if _is_quantized(place.info)}
    if not bits:
        return {}
    usual = max(set(bits.values()), key=list(bits.values()).count)
    entry: dict[str, Any] = {"group_size": blocks.GROUP_SIZE, "bits": usual, "mode": "affine"}
    entry |= {
        module: {"group_size": blocks.GROUP_SIZE, "bits": width, "mode": "affine"}
        for module, width in bits.items()
        if width != usual
    }
    return {"quantization": entry, "quantization_config": entry}


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + (64 << 20):
        raise ModelError(
            f"{folder.parent.parent}: converting needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "free some space there, or choose another folder with --cache-dir."
        )


def _write_config(folder: Path, config: dict[str, Any], vocabulary: Vocabulary) -> None:
    ids: dict[str, Any] = {"eos_token_id": list(vocabulary.stop_ids)}
    if vocabulary.bos_id is not None:
        ids["bos_token_id"] = vocabulary.bos_id
    if vocabulary.pad_id is not None:
        ids["pad_token_id"] = vocabulary.pad_id
    for name, content in (("config.json", config | ids), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
