"""Recorded requests of coding agents, turn after turn: what does not change is the same tokens again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.api.wire.chat_completions import ChatCompletionBody, chat_request
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.chat.encode import PromptEncoder
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.step import RunnerInfo

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "clients" / "recorded"
TURNS = [
    ("opencode", "002", "003"),
    ("pi-local", "001", "002"),
    ("cn", "001", "002"),
]
INFO = RunnerInfo(
    vocab_size=600,
    max_model_len=1_000_000,
    num_pages=8,
    cache=CacheSpec(layers=(LayerSpec(Layout.STATE),), page_size=32, page_bytes=1),
    backend="fake",
    device="fake",
    dtype="float32",
)


def body_of(client: str, number: str) -> dict[str, Any]:
    """A recorded chat body."""
    path = RECORDED / client / f"{number}_POST_v1_chat_completions.json"
    found: dict[str, Any] = json.loads(path.read_text())["body"]
    return found


def chat_bodies() -> list[Path]:
    return sorted(RECORDED.glob("*/*chat_completions.json")) if RECORDED.exists() else []


@pytest.mark.skipif(not RECORDED.exists(), reason="needs the recorded requests")
def test_bodies_of_clients_are_taken_whole(folder: Path) -> None:
    encoder = PromptEncoder(Tokenizer.load(folder), config=Config())
    num_with_tools = 0
    for path in chat_bodies():
        raw = json.loads(path.read_text())["body"]
        if raw.get("response_format", {"type": "text"})["type"] != "text":
            continue  # the shape of answers has tests of its own
        asked = chat_request(decode(json.dumps(raw).encode(), ChatCompletionBody), request_id="r", defaults={})
        assert [tool.name for tool in asked.tools] == [tool["function"]["name"] for tool in raw.get("tools") or ()]
        num_with_tools += bool(asked.tools)
        encoded = encoder.chat(asked, INFO)
        shown = asked.tools if asked.tool_choice.mode != "none" else ()
        assert all(f'"name": "{tool.name}"' in encoded.text for tool in shown)
    assert num_with_tools >= 5


@pytest.mark.skipif(not RECORDED.exists(), reason="needs the recorded requests")
@pytest.mark.parametrize(("client", "first", "second"), TURNS)
def test_the_next_turn_begins_with_the_tokens_of_the_last(folder: Path, client: str, first: str, second: str) -> None:
    encoder = PromptEncoder(Tokenizer.load(folder), config=Config())
    bodies = [decode(json.dumps(body_of(client, number)).encode(), ChatCompletionBody) for number in (first, second)]
    one, two = (encoder.chat(chat_request(body, request_id="r", defaults={}), INFO) for body in bodies)
    assert len(two.prompt) > len(one.prompt) > 500
    assert two.prompt.token_ids[: len(one.prompt)] == one.prompt.token_ids
    # Where the first turn's messages end, a recurrent model's state is kept; the second turn goes on from there.
    assert one.breakpoints
    end = one.breakpoints[-1]
    assert two.prompt.token_ids[:end] == one.prompt.token_ids[:end]
    assert end > 0.95 * len(one.prompt)
