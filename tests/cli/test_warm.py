"""Warm prompts: read and checked before anything starts, computed before the server is ready."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixtures_server import Parts, running
from fixtures_text import WordScript, write_tokenizer

from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.chat.service import ChatService
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli import warm as cli_warm
from vllm_mlx.cli.warm import Warmer, read_warm_prompts
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError
from vllm_mlx.engine.process import ProcessEngine

CHILD = Path(__file__).resolve().parents[1] / "engine" / "fake_child.py"
SYSTEM = {"role": "system", "content": "you are helpful and the quick brown fox jumps " * 6}


def write(path: Path, content: Any) -> str:
    file = path / "warm.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_file_is_a_list_of_message_lists(tmp_path: Path) -> None:
    found = read_warm_prompts(write(tmp_path, [[SYSTEM], [SYSTEM, {"role": "user", "content": "Hi"}]]))
    assert [[message.role for message in messages] for messages in found] == [["system"], ["system", "user"]]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[[", "JSON list"),
        ("", "JSON list"),
        ({"messages": []}, "prompts"),
        ([], "prompts"),
        ([[SYSTEM], []], "prompts.1"),
        ([[SYSTEM], [{"role": "robot", "content": "x"}]], "prompts.1.0"),
        ([[SYSTEM], [{"role": "user"}]], "prompts.1.0.content"),
    ],
)
def test_wrong_file_is_refused_with_its_name_and_the_entry(tmp_path: Path, content: Any, named: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as raised:
        read_warm_prompts(path)
    assert raised.value.message.startswith(f"--warm-prompts: {path}")
    assert named in raised.value.message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--warm-prompts: .*nothing\.json cannot be read"):
        read_warm_prompts(str(tmp_path / "nothing.json"))


async def warm(parts: Parts, *conversations: Any, path: Path) -> list[str]:
    """The progress that was shown."""
    shown: list[str] = []
    warmer = Warmer(
        parts.service,
        read_warm_prompts(write(path, conversations)),
        lifecycle=Lifecycle(),
        progress=lambda text, fraction=None: shown.append(text),
    )
    await warmer.run()
    return shown


@pytest.mark.anyio
async def test_warm_prompts_are_computed_and_shown(tmp_path: Path) -> None:
    backend = write_tokenizer(tmp_path)
    options = {"script": WordScript(backend), "vocab_size": backend.get_vocab_size(), "max_model_len": 256}
    async with running(tmp_path, Config(model="/models/fake", engine="thread"), **options) as parts:
        shown = await warm(parts, [SYSTEM], [SYSTEM, {"role": "user", "content": "hello"}], path=tmp_path)
        assert shown == ["warming prompts (1 of 2)", "warming prompts (2 of 2)"]
        assert (await parts.engine.forget_cache()).num_pages >= 2
        with pytest.raises(ConfigError, match="entry 1"):
            await warm(parts, [SYSTEM], [{"role": "user", "content": "hello " * 400}], path=tmp_path)


@pytest.mark.anyio
async def test_new_engine_is_warmed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_warm, "WATCH_INTERVAL_S", 0.05)
    vocab_size = write_tokenizer(tmp_path).get_vocab_size()
    env = {"FAKE_ENGINE": json.dumps({"options": {"vocab_size": vocab_size, "max_model_len": 256}})}
    engine = ProcessEngine([sys.executable, str(CHILD)], config=Config(), env=env)
    service = ChatService(engine, Tokenizer.load(tmp_path), config=Config())
    warmer = Warmer(
        service,
        read_warm_prompts(write(tmp_path, [[SYSTEM]])),
        lifecycle=Lifecycle(),
        progress=lambda text, fraction=None: None,
    )
    async with asyncio.timeout(60):
        await engine.start()
        keeping = asyncio.create_task(warmer.keep(engine))
        await asyncio.sleep(0)
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        while engine.status().stats.pages_kept == 0:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.05)
        assert engine.status().num_restarts == 1
        keeping.cancel()
        await engine.stop()


@pytest.mark.anyio
async def test_server_is_not_ready_while_it_warms() -> None:
    lifecycle = Lifecycle()
    assert lifecycle.is_warm
    with lifecycle.warming():
        assert not lifecycle.is_warm
        lifecycle.admit()
    assert lifecycle.is_warm
