"""What a model and the form of its state are known by, so that the state of another is never taken for its own."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import mlx.nn as nn
import msgspec
from mlx.utils import tree_flatten

from vllm_mlx.runner import codec
from vllm_mlx.runner.layers import PAGE_SIZE, ModelLayers, paged_groups

WEIGHT_FILES = "model*.safetensors"
"""What the library reads."""
DESCRIBING_FILES = ("config.json", "*.safetensors.index.json", "*.py")
SIZE_BYTES = 16
END_BYTES = 1 << 20
SAMPLE_BYTES = 4096


def fingerprint(path: Path, model: nn.Module, layers: ModelLayers) -> bytes:
    """16 bytes for the model loaded from folder `path` with state in these layers; the folder's own name is no matter.

    To hash all weights would take as long as to load them. Read are: the files that describe the model, the size, head
    and tail of every weight file (the head has the names, types and places of all tensors), and 4 KiB from the middle
    of each tensor. Training, merging or requantising changes nearly every element of the tensors that it touches, so
    none of them leaves the samples of those as they were. The types and shapes of the parameters in memory stand for
    what was done to them at load.

    Raises:
        OSError, ValueError: the files cannot be read.
    """
    described = sorted(file for pattern in DESCRIBING_FILES for file in path.glob(pattern))
    parameters = [(name, array.shape, str(array.dtype)) for name, array in tree_flatten(model.parameters())]
    shapes = [
        (shape.spec, shape.heads, shape.key_dim, shape.value_dim, str(shape.dtype), shape.bits)
        for shape in layers.shapes
    ]
    grouping = paged_groups(layers.paged)
    facts = (
        (codec.VERSION, PAGE_SIZE, version("mlx-lm")),
        [(file.name, file.read_bytes()) for file in described],
        [(file.name, _sampled(file)) for file in sorted(path.glob(WEIGHT_FILES))],
        parameters,
        (shapes, layers.groups, *([grouping] if grouping.is_split else [])),
    )
    return hashlib.blake2b(msgspec.msgpack.encode(facts), digest_size=SIZE_BYTES).digest()


def _sampled(file: Path) -> tuple[int, bytes]:
    """A weight file's size, and a hash of what is read of it."""
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=32)
    with file.open("rb") as stream:
        for place in (0, max(0, size - END_BYTES)):
            stream.seek(place)
            digest.update(stream.read(END_BYTES))
        for place in _middles(stream):
            stream.seek(place)
            digest.update(stream.read(SAMPLE_BYTES))
    return size, digest.digest()


def _middles(stream: BinaryIO) -> list[int]:
    """Where to read a sample from each tensor of a safetensors file, whose first 8 bytes are its header's length."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    header: dict[str, Any] = json.loads(stream.read(length))
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    return [8 + length + max(begin, (begin + end - SAMPLE_BYTES) // 2) for begin, end in spans]
