"""A folder is whole, or the file at fault is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_mlx.core.errors import ModelError
from vllm_mlx.models.folder import check_folder, is_whole


def fails(folder: Path, *parts: str) -> None:
    with pytest.raises(ModelError) as raised:
        check_folder(folder)
    for part in parts:
        assert part in raised.value.message
    assert "\n" not in raised.value.message


def test_whole_folder_passes(model_folder: Path) -> None:
    check_folder(model_folder)
    assert is_whole(model_folder)


def test_missing_config_is_named(model_folder: Path) -> None:
    (model_folder / "config.json").unlink()
    fails(model_folder, "config.json")
    assert not is_whole(model_folder)


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"model_type": 3}', ""])
def test_bad_config_is_named(model_folder: Path, text: str) -> None:
    (model_folder / "config.json").write_text(text)
    fails(model_folder, "config.json")


def test_config_that_is_not_text_is_named(model_folder: Path) -> None:
    (model_folder / "config.json").write_bytes(b"\xff\xfe\x00")
    fails(model_folder, "config.json")


def test_folder_of_ggufs_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.Q8_0.gguf").write_bytes(b"GGUF")
    fails(tmp_path, str(tmp_path / "a.Q8_0.gguf"))


def test_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    fails(tmp_path, "adapter")


def test_missing_weights_are_said(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    fails(model_folder, "model*.safetensors", "pytorch_model.bin", "mlx_lm.convert")


def test_missing_shard_of_the_index_is_named(model_folder: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-extra.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(model_folder, "model-extra.safetensors", "missing")


def test_missing_shard_is_named_without_an_index(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00002.safetensors")
    fails(model_folder, "model-00002-of-00002.safetensors", "missing")


def test_index_without_a_map_is_named(model_folder: Path) -> None:
    (model_folder / "model.safetensors.index.json").write_text("{}")
    fails(model_folder, "model.safetensors.index.json")


@pytest.mark.parametrize("size", [0, 5, 8, 40, -1])
def test_truncated_weights_are_named(model_folder: Path, size: int) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    fails(model_folder, "model.safetensors", "truncated")


def test_weights_with_a_tail_are_named(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    fails(model_folder, "model.safetensors")


def test_git_lfs_pointer_is_told(model_folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (model_folder / "model.safetensors").write_text(text)
    fails(model_folder, "git lfs pull")


def test_missing_tokenizer_is_said(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    fails(model_folder, "tokenizer")


def test_empty_tokenizer_is_named(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").write_text("")
    fails(model_folder, "tokenizer.json", "empty")


def test_code_of_a_model_needs_trust(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text()) | {"model_file": "own.py"}
    (model_folder / "config.json").write_text(json.dumps(config))
    fails(model_folder, "own.py", "--trust-remote-code")
    check_folder(model_folder, trust_remote_code=True)


def test_shards_with_an_index_pass(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file({f"w{i}": np.zeros(3, np.float32)}, model_folder / name)
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_folder(model_folder)
