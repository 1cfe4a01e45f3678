"""How a model's layers are kept: quantised pages if that is asked for, and rows where no kernel reads the pages."""

from __future__ import annotations

from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.step import KernelStatus
from vllm_mlx.runner.kernel_pages import Kernels, decode_variant
from vllm_mlx.runner.kernels.variant import DecodeVariant
from vllm_mlx.runner.layers import ModelLayers

log = get_logger("runner")


def needed_variants(layers: ModelLayers) -> tuple[DecodeVariant, ...] | None:
    """The kernels of the layers in pages, each once; None if the model wants masks, which no kernel reads."""
    if any(shape.attention is not None and shape.attention.has_mask for shape in layers.paged):
        return None
    return tuple(dict.fromkeys(decode_variant(shape) for shape in layers.paged))


def quantise_pages(layers: ModelLayers, kv_cache_dtype: str) -> tuple[ModelLayers, list[str]]:
    """The layers with pages in the form of `--kv-cache-dtype`, and a note where some layers stay as they are.

    Raises:
        ModelError: a quantised form is asked for, and no layer can have it.
    """
    if kv_cache_dtype == "auto":
        return layers, []
    quantised = layers.quantised(int(kv_cache_dtype.removeprefix("int")))
    count, total = sum(shape.bits is not None for shape in quantised.shapes), len(layers.shapes)
    if count == 0:
        raise ModelError(
            f"--kv-cache-dtype {kv_cache_dtype}: no layer of this model can have quantised pages "
            "(pages, and heads of a multiple of 8 elements, are needed); leave the flag out"
        )
    note = f"KV cache in {kv_cache_dtype}" + ("" if count == total else f": {count} of {total} layers")
    return quantised, [note]


def choose_layouts(layers: ModelLayers, kernels: Kernels) -> tuple[ModelLayers, tuple[KernelStatus, ...]]:
    """The layers as they can be kept, and how their kernels fared; one warning for each kernel that failed.

    Gathering pages on a GPU costs many times what attention does, so layers without a kernel move to rows, all of them:
    one layer in rows makes every sequence a row of the running batch anyway.
    """
    variants = needed_variants(layers)
    if variants is None:
        log.warning("the model hands its attention a mask, which no paged kernel reads: layers are kept in rows")
        return layers.out_of_pages(), ()
    checks = [kernels.check(variant) for variant in variants]
    statuses = tuple(KernelStatus(check.name, check.problem, check.error) for check in checks)
    failed = [status for status in statuses if status.problem is not None]
    for status in failed:
        log.warning(f"kernel '{status.name}' is not used, layers are kept in rows (slower): {status.problem}")
    return (layers.out_of_pages() if failed else layers), statuses
