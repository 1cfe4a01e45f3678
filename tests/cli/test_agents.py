"""`vllm-mlx agents check` against the server itself, over a fake model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_script import write_agent_model
from fixtures_server import LiveServer
from fixtures_text import WordScript
from scripted_server import ScriptedServer, whole

from vllm_mlx.cli.agents import DIALECT_NAMES
from vllm_mlx.cli.main import main
from vllm_mlx.core.config import Config

KEY = "sk-check"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The whole server; the model babbles, so that only a grammar makes it call."""
    folder = tmp_path_factory.mktemp("model")
    backend = write_agent_model(folder, [Path(__file__).read_text()])
    script = WordScript(backend)
    config = Config(model="/models/fake", served_model_name="org/coder", api_key=KEY)
    options = {"script": script, "vocab_size": backend.get_vocab_size(), "max_model_len": 16_384}
    with LiveServer(folder, config, **options) as found:
        yield found


@pytest.mark.parametrize("dialect", DIALECT_NAMES)
def test_own_server_passes_in_every_dialect(
    dialect: str, server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["agents", "check", "--url", server.url, "--api-key", KEY, "--dialect", dialect, "--format", "json"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    reports = json.loads(told.out)
    assert told.err.count(" s, ok") == 3
    assert [report["number"] for report in reports] == [1, 2, 3]
    for before, after in itertools.pairwise(reports):
        assert after["num_cached"] >= 0.95 * before["num_prompt"]


def test_table_tells_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(lambda request: whole(500, {"error": {"message": "out of order"}})) as broken:
        assert main(["agents", "check", "--url", broken.url]) == 1
    told = capsys.readouterr().out
    assert told.count("answered 500: out of order") == 3
    assert told.count("WRONG") == 3
    assert "3 of 3 turns went wrong" in told


def test_key_and_server_are_needed(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agents", "check", "--url", server.url]) == 2
    assert "wants another API key" in capsys.readouterr().err
    assert main(["agents", "check", "--url", "http://127.0.0.1:9"]) == 2
    assert "start a server first" in capsys.readouterr().err
    assert main(["agents", "chek"]) == 2
