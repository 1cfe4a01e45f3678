"""Which GGUF tensor becomes which weight of mlx-lm's model, and in which shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from vllm_mlx.models.gguf_blocks import PLAIN
from vllm_mlx.models.gguf_config import REMEDY, architecture
from vllm_mlx.models.gguf_file import GgufFile, TensorInfo


class Placement(msgspec.Struct, frozen=True):
    """One tensor and the module it belongs to."""

    info: TensorInfo
    module: str
    """Such as model.layers.0.self_attn.q_proj."""
    parameter: str
    """weight or bias."""
    permuted_heads: int | None = None
    """Number of heads whose rows are interleaved; None if rows are in order."""


class _Expected(msgspec.Struct, frozen=True):
    module: str
    shape: tuple[int, ...]
    permuted_heads: int | None = None


def placements(file: GgufFile, config: dict[str, Any]) -> list[Placement]:
    """Every tensor of the file with its place, in model order.

    Raises ModelError if one is missing, unknown or of the wrong shape.
    """
    expected = dict(_expected(file, config))
    known = expected.keys() | {"rope_freqs.weight"}
    for name in file.tensors:
        if name not in known:
            raise file.refuse(f"tensor {name} is not known in this architecture; {REMEDY}.")
    found = []
    for name, place in expected.items():
        info = file.tensors.get(name)
        if info is None:
            raise file.refuse(f"has no tensor {name}; the file is not complete, download it again.")
        if info.shape != place.shape:
            raise file.refuse(f"tensor {name} has shape {list(info.shape)} instead of {list(place.shape)}.")
        if len(info.shape) == 1 and info.type_name not in PLAIN:
            raise file.refuse(f"tensor {name} is a vector of type {info.type_name}; {REMEDY}.")
        parameter = name.rpartition(".")[2]
        found.append(Placement(info, place.module, parameter, place.permuted_heads))
    return found


def _expected(file: GgufFile, config: dict[str, Any]) -> Iterator[tuple[str, _Expected]]:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    yield "token_embd.weight", _Expected("model.embed_tokens", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, place in _layer(file, config):
            module = f"model.layers.{layer}.{place.module}"
            yield f"blk.{layer}.{name}", _Expected(module, place.shape, place.permuted_heads)
    yield "output_norm.weight", _Expected("model.norm", (hidden,))
    if not config["tie_word_embeddings"]:
        yield "output.weight", _Expected("lm_head", (vocab, hidden))


def _layer(file: GgufFile, config: dict[str, Any]) -> Iterator[tuple[str, _Expected]]:
    """Tensors of one layer, names relative to it."""
    arch = architecture(file)
    hidden, feed, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention_bias, mlp_bias = config["attention_bias"], config["mlp_bias"]
    output_bias = attention_bias and not arch.has_qkv_bias
    yield "attn_norm.weight", _Expected("input_layernorm", (hidden,))
    if arch.has_qk_norm:
        yield "attn_q_norm.weight", _Expected("self_attn.q_norm", (dim,))
        yield "attn_k_norm.weight", _Expected("self_attn.k_norm", (dim,))
    yield "ffn_norm.weight", _Expected("post_attention_layernorm", (hidden,))
    permuted = (heads, kv_heads) if arch.permuted else (None, None)
    for name, module, rows, columns, num_permuted, has_bias in (
        ("attn_q", "self_attn.q_proj", heads * dim, hidden, permuted[0], attention_bias),
        ("attn_k", "self_attn.k_proj", kv_heads * dim, hidden, permuted[1], attention_bias),
        ("attn_v", "self_attn.v_proj", kv_heads * dim, hidden, None, attention_bias),
        ("attn_output", "self_attn.o_proj", hidden, heads * dim, None, output_bias),
        ("ffn_gate", "mlp.gate_proj", feed, hidden, None, mlp_bias),
        ("ffn_up", "mlp.up_proj", feed, hidden, None, mlp_bias),
        ("ffn_down", "mlp.down_proj", hidden, feed, None, mlp_bias),
    ):
        yield f"{name}.weight", _Expected(module, (rows, columns), num_permuted)
        if has_bias:
            yield f"{name}.bias", _Expected(module, (rows,), num_permuted)
