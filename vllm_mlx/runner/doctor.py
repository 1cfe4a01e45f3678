"""What `vllm-mlx doctor` asks of MLX: the device, and for each kernel whether it is right and how fast it is."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import msgspec

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import one_line
from vllm_mlx.core.step import ProgressCallback
from vllm_mlx.runner import blas, device
from vllm_mlx.runner.head_modules import HeadModules
from vllm_mlx.runner.kernel_choice import needed_variants
from vllm_mlx.runner.kernels.bandwidth import Effort, Speed, copy_bandwidth, decode_bandwidth
from vllm_mlx.runner.kernels.check import Check, check_decode
from vllm_mlx.runner.kernels.heads import check_heads
from vllm_mlx.runner.kernels.variant import ELEMENT_BYTES, DecodeVariant
from vllm_mlx.runner.layers import PAGE_SIZE
from vllm_mlx.runner.load import load_layers

COMMON_SHAPES = (
    # key size, value size, query heads, KV heads, type, window, sinks
    (64, 64, 32, 8, "bfloat16", None, False),
    (64, 64, 64, 8, "bfloat16", 128, True),
    (80, 80, 32, 32, "bfloat16", None, False),
    (96, 96, 32, 32, "bfloat16", None, False),
    (128, 128, 8, 8, "bfloat16", None, False),
    (128, 128, 32, 8, "bfloat16", None, False),
    (128, 128, 64, 8, "bfloat16", None, False),
    (128, 128, 32, 8, "float16", None, False),
    (128, 128, 32, 8, "float32", None, False),
    (192, 128, 16, 16, "bfloat16", None, False),
    (256, 256, 16, 4, "bfloat16", None, False),
)
"""Of layers in much used models."""
COMMON_HEADS = ((64, 32, 8, None), (128, 24, 8, None), (128, 16, 8, 1e-6), (256, 8, 4, 1e-6))
"""Elements of a head, query heads, KV heads, and epsilon of their norm, in much used models."""
CALL_BYTES = 1 << 27
"""Keys and values that one call reads, about: 16 rows of 2,048 tokens at 8 heads of 128 in 16 bits."""
ROW_TOKENS = 2048
MAX_ROWS = 256
"""Layers with a short window read little of each row: they are measured with more rows."""
EFFORT = Effort(num_rounds=5, min_bytes=2 * CALL_BYTES)
LAYOUT_NAMES = {
    Layout.PAGES: "in pages",
    Layout.ROWS: "in rows",
    Layout.STATE: "with a state",
    Layout.OWN: "as the library keeps them, one sequence at a time",
}


class DeviceReport(msgspec.Struct, frozen=True):
    """The device that MLX computes on."""

    backend: str
    """'metal', 'cuda' or 'cpu'."""
    name: str
    memory_bytes: int
    """What it offers one process."""
    machine_memory_bytes: int
    """Of the machine, or of the container if that has less."""
    copy_bytes_per_s: float
    """Read and written together."""
    blas: str | None
    """What multiplies matrices; None on a GPU."""

    @property
    def is_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.backend != "cpu"


class KernelReport(msgspec.Struct, frozen=True):
    """How one of the GPU's kernels fared."""

    name: str
    live: bool
    problem: str | None = None
    """Why it is not used."""
    error: float = 0.0
    """Relative difference, in norm, from plain operations."""
    bytes_per_s: float | None = None
    """Keys and values read; None if not measured."""
    share_of_copy: float | None = None
    """The same over the device's copy bandwidth."""
    note: str | None = None
    """Why it was not measured."""


class ModelReport(msgspec.Struct, frozen=True):
    """The layers of a model, and the kernels that they need."""

    layers: dict[str, int]
    """How layers are kept, and how many are kept so."""
    has_mask: bool
    """The model hands its attention a mask, which no kernel reads."""
    variants: tuple[DecodeVariant, ...]
    """Of the layers in pages."""


def examine_device() -> DeviceReport:
    """Name the device and time copies on it."""
    found = device.probe()
    return DeviceReport(
        backend=found.backend,
        name=found.name,
        memory_bytes=found.memory_bytes,
        machine_memory_bytes=device.machine_memory_bytes(),
        copy_bytes_per_s=copy_bandwidth(found.backend, found.memory_bytes),
        blas=None if found.is_gpu else blas_of_engines(),
    )


def blas_of_engines() -> str:
    """What multiplies matrices in an engine process on this machine's CPU."""
    if sys.platform != "linux":
        return "Accelerate"
    found = blas.find_blas()
    if found is not None:
        return found.name
    return "reference (slow); install the `cpu` extra or the system's libopenblas0"


def examine_model(path: Path, config: Config, *, progress: ProgressCallback) -> ModelReport:
    """Load the model in folder `path` and find out what its layers need.

    Raises:
        ModelError: it cannot be loaded or does not run.
    """
    layers = load_layers(path, config, progress=progress)
    mx.clear_cache()
    counts = Counter(LAYOUT_NAMES[shape.spec.layout] for shape in layers.shapes)
    variants = needed_variants(layers)
    return ModelReport(dict(counts), variants is None, variants or ())


def common_variants() -> tuple[DecodeVariant, ...]:
    """Kernels that much used models need."""
    return tuple(
        DecodeVariant(
            key_dim=key_dim,
            value_dim=value_dim,
            heads=heads,
            kv_heads=kv_heads,
            dtype=dtype,
            page_size=PAGE_SIZE,
            scale=key_dim**-0.5,
            window=window,
            has_sinks=has_sinks,
        )
        for key_dim, value_dim, heads, kv_heads, dtype, window, has_sinks in COMMON_SHAPES
    )


def examine_kernels(
    variants: Sequence[DecodeVariant],
    found: DeviceReport,
    *,
    progress: ProgressCallback,
    effort: Effort = EFFORT,
    call_bytes: int = CALL_BYTES,
) -> tuple[KernelReport, ...]:
    """Check and time the kernels of each variant; none on a CPU."""
    if not found.is_gpu:
        return ()
    measure = partial(measure_decode, backend=found.backend, effort=effort, call_bytes=call_bytes)
    reports = []
    for number, variant in enumerate(variants):
        progress("trying kernels", number / len(variants))
        check = check_decode(variant, found.backend)
        reports.append(_report(check, variant, measure, copy_bytes_per_s=found.copy_bytes_per_s))
        mx.clear_cache()
    return tuple(reports)


def examine_heads(found: DeviceReport) -> tuple[KernelReport, ...]:
    """Check the kernels that make heads of a layer's product, for much used models; none on a CPU."""
    if not found.is_gpu:
        return ()
    reports = []
    for dim, heads, kv_heads, eps in COMMON_HEADS:
        norms = [nn.RMSNorm(dim, eps) for _ in range(2)] if eps is not None else []
        for norm in norms:
            norm.weight = norm.weight.astype(mx.bfloat16)
        modules = HeadModules(nn.RoPE(dim), norms)
        variant = modules.variant(heads=heads, kv_heads=kv_heads, dim=dim, dtype=mx.bfloat16)
        plain = modules.plain(variant)
        check = check_heads(variant, found.backend, rates=modules.rates, norms=modules.norms, plain=plain)
        reports.append(KernelReport(check.name, check.problem is None, check.problem, check.error))
    return tuple(reports)


def measure_decode(variant: DecodeVariant, *, backend: str, effort: Effort, call_bytes: int) -> Speed | None:
    """Speed of the variant's kernels on equal rows that together read about `call_bytes`, most of the rows' tokens."""
    token_bytes = variant.kv_heads * (variant.key_dim + variant.value_dim) * ELEMENT_BYTES[variant.dtype]
    seen = min(ROW_TOKENS, variant.window or ROW_TOKENS, max(1, call_bytes // token_bytes))
    rows = max(1, min(MAX_ROWS, call_bytes // (seen * token_bytes)))
    length = seen + variant.page_size if variant.window else seen
    return decode_bandwidth(variant, [length] * rows, backend, effort=effort)


def _report(
    check: Check,
    variant: DecodeVariant,
    measure: Callable[[DecodeVariant], Speed | None],
    *,
    copy_bytes_per_s: float,
) -> KernelReport:
    if check.problem is not None:
        return KernelReport(check.name, False, check.problem, check.error)
    live = KernelReport(check.name, True, error=check.error)
    try:
        speed = measure(variant)
    except RuntimeError as error:  # such as too little memory: what is right is live all the same
        return msgspec.structs.replace(live, note=one_line(error))
    if speed is None:
        return live
    share = speed.bytes_per_s / copy_bytes_per_s
    return msgspec.structs.replace(live, bytes_per_s=speed.bytes_per_s, share_of_copy=share)
