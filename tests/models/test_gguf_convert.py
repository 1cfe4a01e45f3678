"""Converted weights are the file's own numbers, and mlx-lm computes with them what it computes without GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from vllm_mlx.core.errors import ModelError
from vllm_mlx.models.folder import check_folder
from vllm_mlx.models.gguf_blocks import plain
from vllm_mlx.models.gguf_convert import convert, converted_folder
from vllm_mlx.models.gguf_file import read_header

MakeGguf = Callable[..., Path]
Quiet = Callable[..., None]
Weights = dict[str, np.ndarray]


def into(folder: Path, path: Path, quiet: Quiet) -> dict[str, Any]:
    """Convert `path` into `folder`; returns config.json."""
    folder.mkdir(exist_ok=True)
    convert(read_header(path), folder, progress=quiet)
    check_folder(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def refused(path: Path, tmp_path: Path, quiet: Quiet) -> str:
    with pytest.raises(ModelError) as raised:
        converted_folder(path, tmp_path / "cache", progress=quiet)
    assert "\n" not in raised.value.message
    assert str(path) in raised.value.message
    assert [entry for entry in (tmp_path / "cache").glob("*") if entry.is_dir()] == []
    return raised.value.message


def straight(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's row order from llama.cpp's, written out index by index."""
    dim = rows.shape[0] // heads
    order = [h * dim + 2 * i + half for h in range(heads) for half in range(2) for i in range(dim // 2)]
    return rows[order]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_type_keeps_its_values_exactly(make_gguf: MakeGguf, tmp_path: Path, quiet: Quiet, kind: str) -> None:
    mx = pytest.importorskip("mlx.core")
    path = make_gguf(types=kind)
    config = into(tmp_path / "out", path, quiet)
    made = mx.load(str(tmp_path / "out" / "model.safetensors"))
    expected = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    for module, name, heads in (
        ("model.embed_tokens", "token_embd", 0),
        ("lm_head", "output", 0),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down", 0),
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q", 4),
        ("model.layers.0.self_attn.k_proj", "blk.0.attn_k", 2),
    ):
        weight = made[f"{module}.weight"]
        if f"{module}.scales" in made:
            bits = config["quantization"]["bits"]
            scales, biases = (made[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            weight = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
        reference = expected[f"{name}.weight"]
        reference = straight(reference, heads) if heads else reference
        np.testing.assert_array_equal(np.array(weight.astype(mx.float32)), reference.astype(np.float32))
    is_plain = kind in ("F32", "F16", "BF16")
    assert ("quantization" not in config) == is_plain
    stored = {"F32": "float32", "BF16": "bfloat16"}.get(kind, "float16")
    assert config["torch_dtype"] == stored
    assert str(made["model.norm.weight"].dtype) == f"mlx.core.{stored}"  # all ones: every type holds them
    inexact = made["model.layers.0.input_layernorm.weight"]
    np.testing.assert_array_equal(np.array(inexact), expected["blk.0.attn_norm.weight"])
    if is_plain:
        assert str(made["lm_head.weight"].dtype) == f"mlx.core.{stored}"


def test_q6_k_becomes_float16() -> None:
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (6, 2 * 210), dtype=np.uint8)
    raw.reshape(-1, 210)[:, 208:] = rng.uniform(-1e-2, 1e-2, (12, 1)).astype(np.float16).view(np.uint8)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(plain(raw, "Q6_K"), expected.astype(np.float16))


def test_mixed_widths_are_listed_by_module(make_gguf: MakeGguf, tmp_path: Path, quiet: Quiet) -> None:
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    types = {f"blk.{layer}.{name}.weight": "Q4_1" for layer in range(2) for name in names}
    types |= {"token_embd.weight": "Q8_0", "blk.0.ffn_down.weight": "F16", "blk.1.ffn_down.weight": "Q8_0"}
    quantization = into(tmp_path / "out", make_gguf(types=types), quiet)["quantization"]
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert quantization == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": eight,
        "model.layers.1.mlp.down_proj": eight,
    }


def logits(folder: Path) -> np.ndarray:
    """What mlx-lm computes for one prompt, every layer dequantised to float32."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            for part in ("scales", "biases"):
                module[part] = module[part].astype(mx.float32)
            assert module.group_size == 32, name
    out = model(mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]))
    return np.array(out.astype(mx.float32))


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_mlx_lm_gives_the_logits_of_the_original_weights(
    make_weights: Callable[..., Weights],
    make_gguf: MakeGguf,
    base_config: dict[str, Any],
    tmp_path: Path,
    quiet: Quiet,
    architecture: str,
    tied: bool,
) -> None:
    pytest.importorskip("mlx_lm")
    from safetensors.numpy import save_file

    weights, kind = make_weights(architecture, tied=tied), architecture.removesuffix("-bias")
    original = tmp_path / "original"
    original.mkdir()
    changes = {"model_type": kind, "tie_word_embeddings": tied, "attention_bias": architecture == "llama-bias"}
    (original / "config.json").write_text(json.dumps(base_config | changes))
    save_file(weights, original / "model.safetensors", {"format": "mlx"})
    into(tmp_path / "out", make_gguf(weights=weights, architecture=kind), quiet)
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(original))


def test_quantised_model_computes_what_its_dequantised_weights_give(
    make_gguf: MakeGguf, tiny_weights: Weights, tmp_path: Path, quiet: Quiet
) -> None:
    pytest.importorskip("mlx_lm")
    matrices = {name: array for name, array in tiny_weights.items() if array.ndim > 1}
    kind = gguf.GGMLQuantizationType.Q4_1
    rounded = {name: gguf.dequantize(gguf.quantize(array, kind), kind) for name, array in matrices.items()}
    into(tmp_path / "native", make_gguf(types="Q4_1"), quiet)
    into(tmp_path / "plain", make_gguf(weights=tiny_weights | rounded), quiet)
    np.testing.assert_allclose(logits(tmp_path / "native"), logits(tmp_path / "plain"), atol=2e-4)


def test_large_models_are_sharded_with_an_index(
    make_gguf: MakeGguf, tmp_path: Path, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm_mlx.models.gguf_convert as module
    from vllm_mlx.models.shards import write_shards

    whole = tmp_path / "whole"
    into(whole, make_gguf(), quiet)
    monkeypatch.setattr(module, "write_shards", lambda *a, **k: write_shards(*a, max_shard_bytes=400_000, **k))
    into(tmp_path / "out", make_gguf(), quiet)
    from safetensors.numpy import load_file

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(index.values()))
    assert len(files) > 3
    together = {name: array for file in files for name, array in load_file(tmp_path / "out" / file).items()}
    assert together.keys() == index.keys()
    for name, array in load_file(whole / "model.safetensors").items():
        np.testing.assert_array_equal(together[name], array)


def test_memory_stays_at_about_one_shard(tmp_path: Path) -> None:
    import tracemalloc

    from vllm_mlx.models.shards import Tensor, write_shards

    size = 1 << 20
    tensors = [Tensor(f"w{i}", "float32", (size // 4,), lambda: np.ones(size // 4, np.float32)) for i in range(24)]
    tracemalloc.start()
    write_shards(tmp_path, tensors, written=lambda fraction: None, max_shard_bytes=4 * size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 9 * size


CASES = [
    ({"architecture": "gemma2"}, "architecture gemma2"),
    ({"extra": {"llama.expert_count": 8}}, "llama.expert_count = 8"),
    ({"extra": {"llama.attention.sliding_window": 128}}, "llama.attention.sliding_window"),
    ({"extra": {"llama.attention.value_length": 32}}, "value_length"),
    ({"extra": {"llama.rope.dimension_count": 32}}, "rope.dimension_count"),
    ({"extra": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}}, "yarn"),
    ({"extra": {"llama.block_count": None}}, "llama.block_count is missing"),
    ({"extra": {"llama.block_count": 3}}, "blk.2.attn_norm.weight"),
    ({"extra": {"llama.attention.causal": False}}, "causal"),
    ({"extra": {"llama.attention.head_count_kv": [2, 1]}}, "head_count_kv is a list"),
    ({"extra": {"llama.feed_forward_length": 512}}, "shape"),
    ({"extra": {"split.count": 3}}, "llama-gguf-split"),
    ({"drop": "blk.1.ffn_up.weight"}, "no tensor blk.1.ffn_up.weight"),
    ({"drop": "token_embd.weight"}, "token_embd.weight"),
    ({"raw": {"blk.0.ffn_gate_inp.weight": np.ones((4, 4), np.float32)}}, "blk.0.ffn_gate_inp.weight is not known"),
    ({"raw": {"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}}, "rope_freqs.weight"),
    ({"extra": {"tokenizer.ggml.model": "bert"}}, "tokenizer 'bert'"),
    ({"extra": {"tokenizer.ggml.model": None}}, "tokenizer None"),
    ({"extra": {"tokenizer.ggml.pre": "viking"}}, "'viking'"),
    ({"extra": {"tokenizer.ggml.merges": None}}, "tokenizer.ggml.merges"),
    ({"extra": {"tokenizer.ggml.eos_token_id": 600}}, "eos_token_id is 600"),
    ({"extra": {"tokenizer.ggml.token_type": [1]}}, "token_type"),
    (
        {"extra": {"tokenizer.ggml.tokens": [f"t{i}" for i in range(97)], "tokenizer.ggml.token_type": None}},
        "97 tokens",
    ),
]


@pytest.mark.parametrize(("options", "part"), CASES, ids=[str(part) for _, part in CASES])
def test_what_is_not_supported_is_refused_by_name(
    make_gguf: MakeGguf, tmp_path: Path, quiet: Quiet, options: dict[str, Any], part: str
) -> None:
    assert part in refused(make_gguf(**options), tmp_path, quiet)


def test_neutral_settings_are_accepted(make_gguf: MakeGguf, tmp_path: Path, quiet: Quiet) -> None:
    extra = {
        "llama.expert_count": 0,
        "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.scaling.type": "none",
        "llama.attention.causal": True,
        "llama.feed_forward_length": [288, 288],
    }
    raw = {"rope_freqs.weight": np.ones(32, np.float32)}
    config = into(tmp_path / "out", make_gguf(extra=extra, raw=raw), quiet)
    assert "rope_scaling" not in config
    assert config["rms_norm_eps"] == 1e-5
    assert config["intermediate_size"] == 288


def test_linear_rope_scaling_is_kept(make_gguf: MakeGguf, tmp_path: Path, quiet: Quiet) -> None:
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    scaling = into(tmp_path / "out", make_gguf(extra=extra), quiet)["rope_scaling"]
    assert (scaling["type"], scaling["factor"]) == ("linear", 4.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_become_the_settings_that_made_them(
    make_gguf: MakeGguf, tmp_path: Path, quiet: Quiet, factor: float
) -> None:
    """mlx-lm's own Llama 3 rotation, divided by the plain one, is what a converter stores."""
    rope_utils = pytest.importorskip("mlx_lm.models.rope_utils")
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    rope = rope_utils.Llama3RoPE(dims=64, base=500000.0, scaling_config=scaling)
    divisors = np.array(rope._freqs) / 500000.0 ** (np.arange(0, 64, 2) / 64)
    raw = {"rope_freqs.weight": divisors.astype(np.float32)}
    made = into(tmp_path / "out", make_gguf(extra={"llama.rope.freq_base": 500000.0}, raw=raw), quiet)["rope_scaling"]
    assert made == {"rope_type": "llama3", **scaling}


def test_failed_conversion_leaves_nothing_and_can_be_repeated(
    make_gguf: MakeGguf, tmp_path: Path, quiet: Quiet
) -> None:
    path = make_gguf()

    def stop(text: str, fraction: float | None = None) -> None:
        if fraction is not None and fraction > 0.5:
            raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        converted_folder(path, cache, progress=stop)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []
    check_folder(converted_folder(path, cache, progress=quiet))


def test_demo_model_knows_the_capital_of_france(demo_model: Path) -> None:
    """Real weights, real tokenizer, mlx-lm's own model: five tokens in, ' Paris' out."""
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    from mlx.utils import tree_map, tree_unflatten
    from mlx_lm.utils import load_model
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is").ids
    assert ids == [504, 3575, 282, 4649, 314]
    model, config = load_model(demo_model, lazy=True)
    model.update(tree_map(lambda a: a.astype(mx.float32) if a.dtype == mx.float16 else a, model.parameters()))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.QuantizedLinear):
            weight = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=module.bits)
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = weight
            model.update_modules(tree_unflatten([(name, linear)]))
    best = int(mx.argmax(model(mx.array([ids]))[0, -1]))
    assert tokenizer.decode([best]) == " Paris"
    assert config["eos_token_id"][0] == 2
