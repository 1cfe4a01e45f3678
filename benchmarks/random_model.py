"""Write a model of real size with random weights: what it says is noise, how fast it is depends on its shape only.

    python benchmarks/random_model.py {llama-3.2-3b,qwen3-0.6b,tiny} FOLDER
                                      [--bits 4|8] [--vocab N] [--tokenizer demo|FOLDER] [--seed N]

Needs MLX and mlx-lm. The tokenizer is copied from the demo model or from another model's folder; its vocabulary must
not be larger than the model's (the demo's has 49152 tokens).
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

GROUP_SIZE = 64
SCALE = 0.02
"""Standard deviation of every matrix: logits then have one of about 1."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": {
        "model_type": "llama",
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "tiny": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "vocab_size": 1024,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
}


def build(config: dict[str, Any], *, seed: int, dtype: mx.Dtype = mx.bfloat16) -> nn.Module:
    """mlx-lm's model of that configuration with random weights; norms stay as they are made."""
    library = import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = library.Model(library.ModelArgs.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))
    weights = []
    for name, value in tree_flatten(model.parameters()):
        key, array = next(keys), value.astype(dtype)
        if value.ndim > 1:
            array = mx.random.normal(value.shape, dtype=dtype, scale=SCALE, key=key)
        mx.eval(array)
        weights.append((name, array))
    model.update(tree_unflatten(weights))
    return model


def write(
    folder: Path, config: dict[str, Any], *, bits: int | None = None, seed: int = 0, dtype: mx.Dtype = mx.bfloat16
) -> None:
    """config.json and model.safetensors."""
    model = build(config, seed=seed, dtype=dtype)
    if bits is not None:
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
        config = {**config, "quantization": {"group_size": GROUP_SIZE, "bits": bits}}
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    total = sum(array.nbytes for array in weights.values())
    print(f"{folder}: {config['model_type']}, vocabulary {config['vocab_size']}, {total / 1e9:.2f} GB")


def copy_tokenizer(source: str, folder: Path) -> None:
    """The tokenizer of the demo model, or of the model in a folder."""
    if source == "demo":
        from vllm_mlx.core.config import Config
        from vllm_mlx.models.resolve import resolve

        path = resolve(Config(model="demo"), progress=lambda *_: None).path
    else:
        path = Path(source)
    for name in TOKENIZER_FILES:
        if (path / name).exists():
            shutil.copy(path / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the weights; bfloat16 without it")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary; the shape's own without it")
    parser.add_argument("--tokenizer", metavar="demo|FOLDER", help="copy this model's tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config = {**COMMON, **SHAPES[given.shape]}
    config["vocab_size"] = given.vocab or config["vocab_size"]
    write(given.folder, config, bits=given.bits, seed=given.seed)
    if given.tokenizer:
        copy_tokenizer(given.tokenizer, given.folder)


if __name__ == "__main__":
    main()
