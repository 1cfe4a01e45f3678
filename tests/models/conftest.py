"""Tiny models for this folder's tests: a folder as mlx-lm wants it, and GGUF files written by the `gguf` package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VOCAB, HIDDEN, FEED, LAYERS, HEADS, KV_HEADS, DIM = 96, 256, 288, 2, 4, 2, 64
Weights = dict[str, np.ndarray]

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_weights(architecture: str, *, tied: bool) -> Weights:
    """Weights under mlx-lm's names, in Hugging Face's row order."""
    rng = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": np.ones(HIDDEN, np.float32)}
    if not tied:
        weights["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", HEADS * DIM, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * DIM, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * DIM, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * DIM),
            ("mlp.gate_proj", FEED, HIDDEN),
            ("mlp.up_proj", FEED, HIDDEN),
            ("mlp.down_proj", HIDDEN, FEED),
        ):
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns)
            if architecture == "qwen2" and name[10:] in ("q_proj", "k_proj", "v_proj"):
                weights[f"{prefix}{name}.bias"] = rng.standard_normal(rows).astype(np.float32)
            if architecture == "llama-bias" and name.startswith("self_attn"):
                weights[f"{prefix}{name}.bias"] = rng.standard_normal(rows).astype(np.float32)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if architecture == "qwen3" else []
        for name in norms:
            size = DIM if "self_attn" in name else HIDDEN
            weights[f"{prefix}{name}.weight"] = 1 + rng.standard_normal(size).astype(np.float32) / 8
    return weights


def gguf_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, parameter = name.rpartition(".")
    if module in top:
        return f"{top[module]}.{parameter}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{parameter}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: row i and row i + half of a head become neighbours."""
    order = [head * DIM + half * DIM // 2 + i for head in range(heads) for i in range(DIM // 2) for half in range(2)]
    return rows[order]


BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "c", "ab", "Ġ"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def metadata(architecture: str) -> dict[str, Any]:
    """The least metadata that a file of an architecture has."""
    return {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": FEED,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        **BYTE_LEVEL,
    }


def write_gguf(
    path: Path,
    weights: Weights,
    *,
    architecture: str = "llama",
    types: dict[str, str] | str = "F32",
    extra: dict[str, Any] | None = None,
    raw: dict[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file with `weights`; `types` is one type for all matrices, or one by GGUF name (F32 if not named)."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata(architecture) | (extra or {})).items():
        if value is not None:
            add_value(writer, key, value)
    for name, array in weights.items():
        target = gguf_name(name)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            array = interleave(array, HEADS if ".q_proj." in name else KV_HEADS)
        wanted = types if isinstance(types, str) else types.get(target, "F32")
        kind = gguf.GGMLQuantizationType[wanted if array.ndim > 1 else "F32"]
        writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
    for name, array in (raw or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: Any, key: str, value: Any) -> None:
    """Numbers as GGUF files in the wild have them: uint32 and float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@pytest.fixture(scope="session")
def tiny_weights() -> Weights:
    return random_weights("llama", tied=False)


@pytest.fixture
def make_gguf(tmp_path: Path, tiny_weights: Weights) -> Callable[..., Path]:
    """Write a tiny llama as GGUF; keywords as `write_gguf`, `drop` is a tensor to leave out."""

    def make(*, weights: Weights | None = None, drop: str | None = None, **options: Any) -> Path:
        kept = {name: array for name, array in (weights or tiny_weights).items() if gguf_name(name) != drop}
        return write_gguf(tmp_path / "tiny.gguf", kept, **options)

    return make


@pytest.fixture
def make_weights() -> Callable[..., Weights]:
    return random_weights


def tiny_config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }


@pytest.fixture
def base_config() -> dict[str, Any]:
    """config.json of the tiny llama."""
    return tiny_config()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with everything a model needs; the weights are one small tensor."""
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": np.zeros((4, 4), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def quiet() -> Callable[..., None]:
    """A progress callback that shows nothing."""
    return lambda text, fraction=None: None
