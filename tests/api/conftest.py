"""A server over a fake model, in memory; and on a port where connections matter."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from vllm_mlx.core.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixtures_server import LiveServer, Parts, client_of, running
from fixtures_text import WordScript, write_tokenizer

if TYPE_CHECKING:
    import tokenizers

MODEL = "org/fake-model"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights."""
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the folder."""
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def runner_options(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """How the fake model behaves; it never ends by itself."""
    return {"script": WordScript(backend), "vocab_size": backend.get_vocab_size(), "max_model_len": 512}


@pytest.fixture(scope="module")
def config() -> Config:
    """The server's settings."""
    return Config(model="/models/fake", served_model_name=MODEL, engine="thread")


@pytest.fixture(scope="module")
async def parts(folder: Path, config: Config, runner_options: dict[str, Any]) -> AsyncIterator[Parts]:
    """A running server in memory."""
    async with running(folder, config, **runner_options) as found:
        yield found


@pytest.fixture(scope="module")
async def client(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `parts`."""
    async with client_of(parts.app) as found:
        yield found


@pytest.fixture
def serve(folder: Path, runner_options: dict[str, Any]) -> Iterator[Callable[..., LiveServer]]:
    """Start servers on real ports: serve(config, **changes of the fake model)."""
    started: list[LiveServer] = []

    def start(config: Config, **changes: Any) -> LiveServer:
        server = LiveServer(folder, config, **{**runner_options, **changes})
        started.append(server.__enter__())
        return server

    yield start
    for server in started:
        server.__exit__()
