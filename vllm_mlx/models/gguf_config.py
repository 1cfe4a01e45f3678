"""From GGUF metadata to config.json. What would change the numbers and is not known is refused by name."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from vllm_mlx.models.gguf_file import GgufFile, tensor_rows

REMEDY = "take the safetensors version of the model"


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """How GGUF stores one architecture, and what mlx-lm calls it."""

    model_type: str
    class_name: str
    permuted: bool
    """Rows of q and k are interleaved per head."""
    has_qkv_bias: bool = False
    """Always has biases on q, k and v (and none on the output)."""
    has_qk_norm: bool = False
    may_have_bias: bool = False
    """May have biases on all projections."""


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", class_name="LlamaForCausalLM", permuted=True, may_have_bias=True),
    "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", permuted=False, has_qkv_bias=True),
    "qwen3": Architecture(model_type="qwen3", class_name="Qwen3ForCausalLM", permuted=False, has_qk_norm=True),
}

KNOWN = {
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
"""Metadata under the architecture's name that is used below, or that changes nothing."""


def architecture(file: GgufFile) -> Architecture:
    """The architecture of a file; raises ModelError if it is not one of ARCHITECTURES."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise file.refuse(f"does not say its architecture; {REMEDY}.")
    if name not in ARCHITECTURES:
        raise file.refuse(f"architecture {name} is not one of {', '.join(ARCHITECTURES)}; {REMEDY}.")
    if file.metadata.get("split.count", 1) > 1:
        raise file.refuse("is one part of a split model; join the parts with `llama-gguf-split --merge`.")
    return ARCHITECTURES[name]


def model_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json, without quantisation and token ids. Raises ModelError for what is not supported."""
    arch = architecture(file)
    _refuse_unknown(file)
    num_heads = _integer(file, "attention.head_count")
    hidden_size = _integer(file, "embedding_length")
    head_dim = _integer(file, "attention.key_length", default=hidden_size // max(num_heads, 1))
    _require_equal(file, "attention.value_length", head_dim)
    _require_equal(file, "rope.dimension_count", head_dim)
    if "token_embd.weight" not in file.tensors:
        raise file.refuse(f"has no tensor token_embd.weight; {REMEDY}.")
    rope_theta = _number(file, "rope.freq_base", default=10000.0)
    config: dict[str, Any] = {
        "architectures": [arch.class_name],
        "model_type": arch.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": _integer(file, "feed_forward_length"),
        "num_hidden_layers": _integer(file, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _integer(file, "attention.head_count_kv", default=num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": _integer(file, "context_length"),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": rope_theta,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": arch.has_qkv_bias or (arch.may_have_bias and "blk.0.attn_q.bias" in file.tensors),
        "mlp_bias": arch.may_have_bias and "blk.0.ffn_up.bias" in file.tensors,
        "hidden_act": "silu",
        "torch_dtype": _dtype(file),
    }
    if scaling := _rope_scaling(file, head_dim, rope_theta):
        config["rope_scaling"] = scaling
    return config


def _key(file: GgufFile, name: str) -> str:
    return f"{file.metadata['general.architecture']}.{name}"


def _refuse_unknown(file: GgufFile) -> None:
    prefix = _key(file, "")
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name not in KNOWN and value not in (0, False, "", [], "none"):
            raise file.refuse(f"{key} = {value!r} is not supported; {REMEDY}.")
    if file.metadata.get(_key(file, "attention.causal"), True) is not True:
        raise file.refuse("is not a causal language model; only those can be served.")


def _integer(file: GgufFile, name: str, *, default: int | None = None) -> int:
    value = file.metadata.get(_key(file, name), default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]  # one number per layer, all the same
    if not isinstance(value, int) or value < 1:
        raise file.refuse(f"{_key(file, name)} is {_short(value)} instead of one positive number; {REMEDY}.")
    return value


def _number(file: GgufFile, name: str, *, default: float | None = None) -> float:
    value = file.metadata.get(_key(file, name), default)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise file.refuse(f"{_key(file, name)} is {_short(value)} instead of a number; {REMEDY}.")
    return float(f"{value:.7g}")  # stored as float32: 9.999999747e-06 was 1e-05


def _require_equal(file: GgufFile, name: str, head_dim: int) -> None:
    value = _integer(file, name, default=head_dim)
    if value != head_dim:
        raise file.refuse(f"{_key(file, name)} is {value}, but heads have {head_dim} dimensions; {REMEDY}.")


def _short(value: object) -> str:
    return "missing" if value is None else "a list" if isinstance(value, list) else repr(value)


def _dtype(file: GgufFile) -> str:
    """The type to compute in: the one that the matrices, or the scales of quantised ones, are stored in."""
    types = {info.type_name for info in file.tensors.values() if len(info.shape) > 1}
    if types == {"F32"}:
        return "float32"
    return "bfloat16" if types <= {"BF16", "F32"} else "float16"


def _rope_scaling(file: GgufFile, head_dim: int, base: float) -> dict[str, Any] | None:
    kind = file.metadata.get(_key(file, "rope.scaling.type"), "none")
    factor = file.metadata.get(_key(file, "rope.scaling.factor"), 0)
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, head_dim, base)
    if kind == "none" or factor in (0, 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": float(factor)}
    raise file.refuse(f"rope scaling {kind!r} is not supported; {REMEDY}.")


def _llama3_scaling(file: GgufFile, head_dim: int, base: float) -> dict[str, Any] | None:
    """Find the settings of Llama 3's scaling that give the divisors in rope_freqs.weight."""
    stored = _float32_values(file, "rope_freqs.weight")
    if len(stored) != head_dim // 2:
        raise file.refuse(f"rope_freqs.weight has {len(stored)} values instead of {head_dim // 2}; {REMEDY}.")
    if all(value == 1 for value in stored):
        return None
    factor = round(max(stored), 4)
    written: int = file.metadata.get(_key(file, "rope.scaling.original_context_length"), 8192)
    for original in (written, 8192):
        made = [_llama3_divisor(base ** (2 * i / head_dim), factor, original) for i in range(head_dim // 2)]
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(made, stored, strict=True)):
            numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {"rope_type": "llama3", **numbers, "original_max_position_embeddings": original}
    raise file.refuse(f"rope_freqs.weight holds factors of an unknown kind; {REMEDY}.")


def _llama3_divisor(period: float, factor: float, original: int) -> float:
    """Llama 3.1's scaling of one frequency 1 / period, with low and high frequency factors 1 and 4."""
    wavelength = 2 * math.pi * period
    if wavelength < original / 4:
        return 1.0
    if wavelength > original:
        return factor
    smooth = (original / wavelength - 1) / 3
    return 1 / ((1 - smooth) / factor + smooth)


def _float32_values(file: GgufFile, name: str) -> list[float]:
    info = file.tensors[name]
    if info.type_name != "F32":
        raise file.refuse(f"tensor {name} is of type {info.type_name} instead of F32; {REMEDY}.")
    values: list[float] = tensor_rows(file, info).view("<f4").ravel().tolist()
    return values
