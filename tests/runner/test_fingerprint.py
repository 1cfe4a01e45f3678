"""A model is known again wherever it lies, and every other one is told from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from plain_kernels import PlainKernels

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import RunnerInfo
from vllm_mlx.runner.load import create_runner_factory

Folder = Callable[[str], Path]


def info_of(folder: Path, *, kernels: PlainKernels | None = None, **settings: object) -> RunnerInfo:
    config = Config(model="tiny", **{"num_pages": 8, **settings})
    runner = create_runner_factory(folder, config, kernels=kernels)(lambda *_: None)
    try:
        return runner.info
    finally:
        runner.close()


def known_by(folder: Path, **settings: object) -> bytes:
    found = info_of(folder, **settings).fingerprint
    assert len(found) == 16
    return found


def test_it_is_the_same_in_another_folder_with_other_room(tiny_model: Folder, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model("llama"), tmp_path / "elsewhere")
    one = known_by(tiny_model("llama"))
    assert known_by(moved, num_pages=16, max_num_seqs=3, max_model_len=128) == one


def test_the_form_of_weights_and_pages_is_part_of_it(tiny_model: Folder) -> None:
    folder = tiny_model("llama")
    found = [
        known_by(folder),
        known_by(folder, dtype="bfloat16"),
        known_by(folder, dtype="float16"),
        known_by(folder, kv_cache_dtype="int8"),
        known_by(folder, kv_cache_dtype="int4"),
        info_of(folder, kernels=PlainKernels(broken=True)).fingerprint,
    ]
    assert len(set(found)) == len(found)


def test_every_tensor_and_the_configuration_are_part_of_it(tiny_model: Folder, tmp_path: Path) -> None:
    import mlx.core as mx

    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    file = folder / "model.safetensors"
    weights = {name: mx.array(array) for name, array in mx.load(str(file)).items()}
    found = {known_by(folder)}
    for name, array in weights.items():
        mx.save_safetensors(str(file), weights | {name: array * 1.01}, metadata={"format": "mlx"})
        found.add(known_by(folder))
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 20000.0}))
    found.add(known_by(folder))
    assert len(found) == len(weights) + 2


def test_a_change_in_the_middle_of_a_large_file_is_seen(tmp_path: Path) -> None:
    import mlx.core as mx

    from vllm_mlx.runner.fingerprint import END_BYTES, _sampled

    weights = {f"layers.{i}": mx.random.normal((256, 2048)) for i in range(4)}
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), weights)
    before = _sampled(file)
    weights["layers.1"] = weights["layers.1"] * 1.001
    mx.save_safetensors(str(file), weights)
    assert file.stat().st_size > 4 * END_BYTES
    assert _sampled(file) != before


@pytest.mark.parametrize(
    ("name", "share"), [("llama", 0), ("qwen3_next", 10), ("mamba2", 2), ("deepseek_v3", 2), ("llama4", 2)]
)
def test_room_for_checkpoints_is_taken_off_the_pages(name: str, share: int, tiny_model: Folder) -> None:
    settings = {"cache_memory_mb": 4, "num_pages": None, "max_num_seqs": 2000}
    info = info_of(tiny_model(name), **settings)
    assert info.checkpoint_bytes == ((4 << 20) // share if share else 0)
    if info.num_pages:
        left = (4 << 20) - info.checkpoint_bytes
        assert left - info.cache.page_bytes < (info.num_pages - 1) * info.cache.page_bytes <= left


def test_without_a_prefix_cache_nothing_is_left_for_checkpoints(tiny_model: Folder) -> None:
    assert info_of(tiny_model("qwen3_next"), prefix_cache=False).checkpoint_bytes == 0
