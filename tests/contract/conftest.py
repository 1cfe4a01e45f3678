"""Servers that the official clients talk to. Every way to make one runs the same suite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures_server import LiveServer
from fixtures_text import WordScript, write_tokenizer
from served import Served

from vllm_mlx.core.config import Config

KEY = "sk-contract"


@dataclass(frozen=True)
class Target:
    """A server that listens."""

    url: str
    """Without a path."""
    model: str
    api_key: str


def fake(folder: Path) -> Iterator[Target]:
    """The whole server over a fake model that never ends by itself."""
    backend = write_tokenizer(folder)
    config = Config(model="/models/fake", served_model_name="org/fake-model", api_key=KEY)
    with LiveServer(
        folder, config, script=WordScript(backend), vocab_size=backend.get_vocab_size(), max_model_len=1024
    ) as server:
        yield Target(server.url, server.model, KEY)


def real(folder: Path) -> Iterator[Target]:
    """The command itself, with the demo model in an engine process."""
    options = (
        "--served-model-name",
        "org/demo",
        "--api-key",
        KEY,
        "--max-model-len",
        "1024",
        "--default-temperature",
        "1",
    )
    with Served(folder / "log", "demo", *options) as server:
        yield Target(server.url, "org/demo", KEY)


MAKERS = {"fake": fake, "real": real}


@pytest.fixture(scope="session", params=list(MAKERS))
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server of each kind."""
    yield from MAKERS[request.param](tmp_path_factory.mktemp("model"))
