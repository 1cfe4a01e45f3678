"""From a folder on disk to a runner on the calling thread."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from vllm_mlx import families
from vllm_mlx.core.cachespec import MAX_CHUNKS_IN_FLIGHT, CacheSpec, Layout
from vllm_mlx.core.config import EXPANDED_DTYPES, Config
from vllm_mlx.core.errors import ModelError, one_line
from vllm_mlx.core.step import KernelStatus, MemoryUse, ProgressCallback, Runner, RunnerFactory, RunnerInfo
from vllm_mlx.runner import blas

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from vllm_mlx.core.family import Family
    from vllm_mlx.runner.device import Device
    from vllm_mlx.runner.fused_heads import FusedHeads
    from vllm_mlx.runner.head import WantedPositions
    from vllm_mlx.runner.kernel_pages import Kernels
    from vllm_mlx.runner.layers import ModelLayers
    from vllm_mlx.runner.runner import MlxRunner

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length")
UNBOUNDED_CONTEXT = 131_072
"""Tokens allowed to a model that states no limit."""
DEFAULT_MIN_CHUNK, MIN_CHUNKS = 32, {"cuda": 512}
"""Tokens below which a chunk costs a device its launches, not its arithmetic: a data-centre GPU computes some hundred
tokens while its host launches one pass over them."""
INITIAL_CPU_PAGES = 64
"""Pools on a CPU start this small and double as pages are used; a GPU's are allocated whole."""
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model folder that does not fit its architecture makes the library raise."""


def create_runner_factory(path: Path, config: Config, *, kernels: Kernels | None = None) -> RunnerFactory:
    """A factory that loads the model in folder `path`; call it on the thread that will run the model.

    `kernels` are the GPU's own unless given; on a CPU there are none.
    """
    return partial(_create_runner, path, config, kernels)


def load_layers(path: Path, config: Config, *, progress: ProgressCallback) -> ModelLayers:
    """The layers of the model in folder `path`, found out by running it; nothing of it is kept.

    Raises:
        ModelError: the model cannot be loaded or does not run.
    """
    return _load(path, config, progress, has_kernels=False).layers


class _Loaded(NamedTuple):
    """A model in memory, and what was found out on the way."""

    model: nn.Module
    layers: ModelLayers
    found: Device
    family: Family
    settings: dict[str, Any]
    notes: list[str]


def _load(path: Path, config: Config, progress: ProgressCallback, *, has_kernels: bool) -> _Loaded:
    """Start MLX and load the model, with its attention bound; in the form for kernels if there are some."""
    progress("starting MLX")
    blas.preload_here()
    with untouched_file_limit():
        import mlx_lm.utils  # noqa: F401
    from vllm_mlx.runner import attention, device, layers

    found = device.probe()
    device.configure(found, config.gpu_memory_utilization)
    settings = _read_config(path)
    family = families.find(str(settings.get("model_type")))
    if family.unsupported:
        raise ModelError(f"{config.model}: {family.name} models cannot be served: {family.unsupported}")
    progress("loading weights")
    model, notes = _load_model(path, config, found, has_kernels=has_kernels or found.is_gpu)
    attention.bind()
    progress("inspecting the model")
    try:
        model_layers = layers.inspect_layers(model, batched=family.batched_decode)
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{config.model}: the model does not run: {one_line(error)}") from error
    return _Loaded(model, model_layers, found, family, settings, notes)


def _create_runner(path: Path, config: Config, kernels: Kernels | None, progress: ProgressCallback) -> Runner:
    loaded = _load(path, config, progress, has_kernels=kernels is not None)
    model, model_layers, found, family, settings, notes = loaded
    from vllm_mlx.runner import head
    from vllm_mlx.runner.fingerprint import fingerprint
    from vllm_mlx.runner.fused_heads import FusedHeads, fuse_heads
    from vllm_mlx.runner.kernel_choice import choose_layouts, quantise_pages
    from vllm_mlx.runner.kernel_pages import Kernels

    wanted = head.keep_last_position(model, model_layers.vocab_size)
    model_layers, more_notes = quantise_pages(model_layers, config.kv_cache_dtype)
    notes = [*notes, *more_notes]
    statuses: tuple[KernelStatus, ...] = ()
    if kernels is None and found.is_gpu:
        kernels = Kernels(found.backend)
    if kernels is not None:
        progress("checking kernels")
        model_layers, statuses = choose_layouts(model_layers, kernels)
    info = _describe(settings, config, found, model, model_layers, notes)
    try:
        known_by = fingerprint(path, model, model_layers)
    except (OSError, ValueError) as error:
        raise ModelError(f"{config.model}: the model's files cannot be read: {one_line(error)}") from error
    fused = FusedHeads()
    if kernels is not None and not config.enforce_eager:
        fused = fuse_heads(model, model_layers, kernels)
    statuses += tuple(KernelStatus(check.name, check.problem, check.error) for check in fused.checks)
    info = msgspec.structs.replace(info, kernels=statuses, fingerprint=known_by)
    runner = _build_runner(model, model_layers, info, family, config, kernels, wanted, fused)
    runner.warm(progress)
    gc.collect()
    gc.freeze()  # the libraries' objects live for ever; walking them again and again would stall steps
    return runner


def _build_runner(
    model: nn.Module,
    layers: ModelLayers,
    info: RunnerInfo,
    family: Family,
    config: Config,
    kernels: Kernels | None,
    wanted: WantedPositions,
    fused: FusedHeads,
) -> MlxRunner:
    import mlx.core as mx

    from vllm_mlx.runner.compiled import CompiledSteps
    from vllm_mlx.runner.decode_step import DecodeStep
    from vllm_mlx.runner.kernel_pages import KernelPages
    from vllm_mlx.runner.lone_chunks import LoneChunks, are_planned
    from vllm_mlx.runner.pages import GrowingPages
    from vllm_mlx.runner.prefill_step import PrefillStep
    from vllm_mlx.runner.runner import MlxRunner
    from vllm_mlx.runner.staging import Staging

    shapes = layers.paged
    build = partial(MlxRunner, model, layers, info=info, family=family, wanted=wanted, max_rows=config.max_num_seqs)
    if kernels is None or not shapes:
        return build(pages=GrowingPages(shapes, num_pages=INITIAL_CPU_PAGES, max_pages=info.num_pages))
    max_pages = -(-info.max_model_len // info.cache.page_size)
    staging = Staging() if kernels.waits_for_memory else None
    build = partial(build, staging=staging)
    try:
        pages = KernelPages(
            shapes,
            kernels=kernels,
            num_pages=info.num_pages,
            num_slots=config.max_num_seqs,
            max_pages=max_pages,
            send=staging.send if staging is not None else mx.array,
        )
    except RuntimeError as error:
        size = info.num_pages * info.cache.page_bytes >> 20
        raise ModelError(f"the KV cache of {size} MiB cannot be allocated (--cache-memory-mb): {error}") from error
    if config.enforce_eager or len(shapes) < len(layers.shapes):
        return build(pages=pages)
    compiled = CompiledSteps(DecodeStep(model, layers, pages, max_rows=config.max_num_seqs, fused=fused))
    if not any(pool.rounds for pool in pages.pools):
        sizes = {"chunk_size": config.prefill_step_size, "max_tokens": info.max_model_len}
        has_plans = kernels.plans_attention and are_planned(shapes)
        lone = LoneChunks(model, layers, pages, wanted=wanted, **sizes) if has_plans else None
        compiled.prefill = PrefillStep(model, layers, pages, wanted=wanted, lone=lone)
    return build(pages=pages, compiled=compiled)


@contextmanager
def untouched_file_limit() -> Iterator[None]:
    """Importing mlx-lm lowers RLIMIT_NOFILE for good, which a server with many connections cannot afford."""
    import resource

    original = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = original


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path / 'config.json'} is not a JSON object")
    return settings


def _load_model(path: Path, config: Config, found: Device, *, has_kernels: bool) -> tuple[nn.Module, list[str]]:
    """The model with its weights in memory, in the type to compute in, and notes for the banner."""
    import mlx_lm.utils as library

    from vllm_mlx.runner import projections, weights

    memory_bytes = int(found.memory_bytes * config.gpu_memory_utilization) if found.is_gpu else found.memory_bytes
    try:
        model, settings = library.load_model(path, lazy=True, trust_remote_code=config.trust_remote_code)
        dtype = _compute_dtype(settings, config, found)
        if has_kernels:
            projections.merge_projections(model)
        notes = weights.prepare(model, config.weights_dtype, found=found, dtype=dtype, memory_bytes=memory_bytes)
        if found.is_gpu:
            projections.keep_transposed(model)
            projections.split_by_kernel(model, found.backend)
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{config.model} cannot be loaded: {one_line(error)}") from error
    return model, [blas.describe(), *notes] if not found.is_gpu else notes


def _compute_dtype(settings: dict[str, Any], config: Config, found: Device) -> mx.Dtype | None:
    """The type to compute in: the operator's choice, float32 on a CPU, else what the model states, if it does."""
    import mlx.core as mx

    name = EXPANDED_DTYPES.get(config.weights_dtype, config.dtype)
    if name == "auto":
        stated = settings.get("dtype") or settings.get("torch_dtype")
        name = str(stated).removeprefix("torch.") if found.is_gpu else "float32"
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}.get(name)


def _describe(
    settings: dict[str, Any],
    config: Config,
    found: Device,
    model: nn.Module,
    model_layers: ModelLayers,
    notes: list[str],
) -> RunnerInfo:
    """All that the engine needs to know."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    spec = model_layers.cache_spec()
    context = _context_length(settings, config)
    budget = _cache_budget(config, found)
    checkpoint_bytes = _checkpoint_bytes(config, model, spec, budget)
    num_pages = _num_pages(config, spec, context, budget - checkpoint_bytes)
    longest = spec.page_groups.most_tokens(num_pages - 1)
    if longest is not None and longest < context:
        context = longest
        notes = [*notes, f"context limited to {context} tokens by the KV cache's memory (--cache-memory-mb)"]
    weights = [array for _, array in tree_flatten(model.parameters())]
    floats = [array.dtype for array in weights if mx.issubdtype(array.dtype, mx.floating)]
    return RunnerInfo(
        vocab_size=model_layers.vocab_size,
        max_model_len=context,
        num_pages=num_pages if spec.is_paged else 0,
        cache=spec,
        backend=found.backend,
        device=found.name,
        dtype=str(max(set(floats), key=floats.count)).removeprefix("mlx.core.") if floats else "",
        batched_decode=all(layer.layout is not Layout.OWN for layer in spec.layers),
        chunked_decode=all(layer.layout is Layout.PAGES for layer in spec.layers),
        notes=tuple(notes),
        checkpoint_bytes=checkpoint_bytes,
        min_chunk=MIN_CHUNKS.get(found.backend, DEFAULT_MIN_CHUNK),
        memory=MemoryUse(active=mx.get_active_memory(), weights=sum(array.nbytes for array in weights)),
    )


def _context_length(settings: dict[str, Any], config: Config) -> int:
    """Longest sequence: the operator's choice, else the model's own limit."""
    sources = [source for source in (settings, settings.get("text_config")) if isinstance(source, dict)]
    stated = [source.get(key) for source in sources for key in CONTEXT_KEYS]
    own = next((value for value in stated if type(value) is int and value > 1), None)
    if config.max_model_len is None:
        return own or UNBOUNDED_CONTEXT
    if own is not None and config.max_model_len > own:
        raise ModelError(f"--max-model-len {config.max_model_len} is more than the model's context of {own} tokens")
    return config.max_model_len


def _cache_budget(config: Config, found: Device) -> int:
    """Bytes that the memory settings allow for all that is remembered of sequences."""
    import mlx.core as mx

    if config.cache_memory_mb is not None:
        return config.cache_memory_mb << 20
    budget = int(found.memory_bytes * config.cache_memory_percent)
    if found.is_gpu:
        budget = min(budget, int(found.memory_bytes * config.gpu_memory_utilization) - mx.get_active_memory())
    return max(0, budget)


def _checkpoint_bytes(config: Config, model: nn.Module, spec: CacheSpec, budget: int) -> int:
    """The checkpoints' part of the budget.

    A tenth where pages take the rest. Without pages half of it: running sequences need the other half, whose rows and
    states are as large as the checkpoints taken of them. Nothing if none will be taken, or could be restored.
    """
    from vllm_mlx.runner.checkpoints import are_restorable
    from vllm_mlx.runner.layers import flat_caches

    if not config.prefix_cache or all(layer.layout is Layout.PAGES for layer in spec.layers):
        return 0
    if any(layer.layout is Layout.OWN for layer in spec.layers) and not are_restorable(flat_caches(model)):
        return 0
    return budget // 10 if spec.is_paged else budget // 2


def _num_pages(config: Config, spec: CacheSpec, context: int, budget: int) -> int:
    """Pages that fit into `budget` bytes, scratch page included, and no more than all sequences could ever fill."""
    page_bytes = spec.page_bytes
    if page_bytes == 0:
        return 0
    if config.num_pages is not None:
        return config.num_pages
    in_flight = MAX_CHUNKS_IN_FLIGHT * config.prefill_step_size
    most = config.max_num_seqs * spec.page_groups.pages_for(context, num_in_flight=in_flight)
    pages = min(budget // page_bytes, most) + 1
    if pages < 1 + len(spec.windows):
        raise ModelError(
            f"no memory is left for the KV cache: one page takes {page_bytes >> 10} KiB (--cache-memory-mb)"
        )
    return pages
