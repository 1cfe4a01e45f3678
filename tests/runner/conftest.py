"""Tiny models on disk, and a way to run sequences through a real scheduler and runner without threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import Runner
from vllm_mlx.runner import blas
from vllm_mlx.runner.kernel_pages import Kernels
from vllm_mlx.runner.staging import Staging

blas.preload_here()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model, written once."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write_tiny_model(name, path)

    return folder


@pytest.fixture
def overwrite_free(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, memory that a step's numbers went through is overwritten as soon as it may be used again."""
    done = Staging.done

    def overwriting(staging: Staging) -> None:
        done(staging)
        for pieces in staging._free.values():
            for piece in pieces:
                piece.view[:] = 0

    return lambda: monkeypatch.setattr(Staging, "done", overwriting)


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
