"""Tiny models on disk, and a way to run sequences through a real scheduler and runner without threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import config_of

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import Runner
from vllm_mlx.runner import blas
from vllm_mlx.runner.kernel_pages import Kernels

blas.preload_here()


def write_tiny_model(name: str, folder: Path, *, seed: int = 0) -> Path:
    """A model of `ARCHITECTURES` with random weights, as mlx-lm reads it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from vllm_mlx.runner.load import untouched_file_limit

    with untouched_file_limit():
        from mlx_lm.utils import _get_classes

    config = config_of(name)
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    weights = {}
    for key, value in tree_flatten(model_class(args_class.from_dict(config)).parameters()):
        is_matrix = value.ndim > 1 and not key.endswith("A_log")
        weights[key] = mx.random.normal(value.shape) * 0.08 if is_matrix else value
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model, written once."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write_tiny_model(name, path)

    return folder


@pytest.fixture
def open_runner(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Runner]]:
    """Load a tiny model into a runner; closed after the test."""
    from vllm_mlx.runner.load import create_runner_factory

    opened: list[Runner] = []

    def open_(name: str, *, kernels: Kernels | None = None, **settings: object) -> Runner:
        config = Config(model=name, **{"num_pages": 64, **settings})
        opened.append(create_runner_factory(tiny_model(name), config, kernels=kernels)(lambda *_: None))
        return opened[-1]

    yield open_
    for runner in opened:
        runner.close()
