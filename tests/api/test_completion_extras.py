"""POST /v1/completions: prompts with log-probabilities, best_of, and filling in."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from fixtures_server import Parts, client_of, running
from fixtures_text import WordScript, write_tokenizer

from vllm_mlx.api.wire.best_of import Best
from vllm_mlx.chat.collect import Collected, CollectedChoice
from vllm_mlx.core.config import Config
from vllm_mlx.core.events import TokenInfo, Usage
from vllm_mlx.core.messages import FinishReason

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"
PROMPT = "once upon a time"


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"prompt": PROMPT, "max_tokens": 3, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(client: httpx.AsyncClient, **fields: Any) -> str | None:
    answer = await client.post(PATH, json={"prompt": PROMPT, "max_tokens": 3, **fields})
    assert answer.status_code == 400, answer.text
    param: str | None = answer.json()["error"]["param"]
    return param


async def test_echo_with_logprobs_tells_every_token(client: httpx.AsyncClient, parts: Parts) -> None:
    ids = parts.tokenizer.encode(PROMPT, add_special_tokens=True)
    [choice] = (await ask(client, echo=True, logprobs=2))["choices"]
    logprobs = choice["logprobs"]
    assert [len(values) for values in logprobs.values()] == [len(ids) + 3] * 4
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    for i, previous in enumerate(ids[:-1], start=1):  # the fake model's rule
        assert logprobs["token_logprobs"][i] == -math.log(2) * (1 + previous % 2)


async def test_scored_prompt_is_computed_from_its_beginning(client: httpx.AsyncClient) -> None:
    long = "one two three " * 40
    await ask(client, prompt=long)
    assert (await ask(client, prompt=long))["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    for _ in range(2):
        answer = await ask(client, prompt=long, echo=True, logprobs=0, max_tokens=1)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        values = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert len(values) == answer["usage"]["prompt_tokens"] + 1
        assert None not in values[1:]


async def test_prompts_and_choices_each_have_their_scores(client: httpx.AsyncClient) -> None:
    choices = (await ask(client, prompt=[[5, 6, 7], [8]], n=2, echo=True, logprobs=1, max_tokens=1))["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [4, 4, 2, 2]


async def test_stream_echoes_logprobs_too(client: httpx.AsyncClient) -> None:
    fields = {"echo": True, "logprobs": 1}
    whole = (await ask(client, **fields))["choices"][0]
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True, **fields}
    blocks = (await client.post(PATH, json=body)).text.split("\n\n")[:-2]
    pieces = [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [each for piece in pieces if piece["logprobs"] for each in piece["logprobs"][name]] == values


async def test_nothing_is_generated_for_max_tokens_0(client: httpx.AsyncClient) -> None:
    answer = await ask(client, echo=True, logprobs=1, max_tokens=0)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert await refused(client, max_tokens=0) == "max_tokens"


async def test_prompt_logprobs_have_vllms_shape(client: httpx.AsyncClient, parts: Parts) -> None:
    ids = parts.tokenizer.encode(PROMPT, add_special_tokens=True)
    [choice] = (await ask(client, prompt_logprobs=1))["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for token_id, previous, found in zip(ids[1:], ids, others, strict=False):
        own = found[str(token_id)]
        assert own["decoded_token"] == parts.tokenizer.token_text(token_id)
        assert own["rank"] == 1 + previous % 2
        assert len(found) == own["rank"]
    assert "prompt_logprobs" not in (await ask(client))["choices"][0]
    assert await refused(client, prompt_logprobs=1, stream=True) == "prompt_logprobs"
    assert await refused(client, prompt_logprobs=21) == "prompt_logprobs"


async def test_chat_tells_prompt_logprobs(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2, "prompt_logprobs": 0}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    found = answer["prompt_logprobs"]
    assert len(found) == answer["usage"]["prompt_tokens"]
    assert found[0] is None
    assert all(len(place) == 1 for place in found[1:])


async def test_best_of_returns_n_of_the_candidates(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt=["one", "two"], best_of=4, n=2, temperature=1, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in answer["choices"]] == [None] * 4
    assert answer["usage"]["completion_tokens"] == 2 * 4 * 3
    assert await refused(client, best_of=1, n=2) == "best_of"
    assert await refused(client, best_of=2, stream=True) == "best_of"
    assert len((await ask(client, best_of=2, n=2))["choices"]) == 2


async def test_best_choices_have_the_highest_logprob_per_token() -> None:
    def candidate(*logprobs: float) -> CollectedChoice:
        tokens = tuple(TokenInfo("x", b"x", value) for value in logprobs)
        return CollectedChoice(str(logprobs), FinishReason.LENGTH, Usage(), tokens=tokens)

    likely, longer, unlikely, other = candidate(-1.0), candidate(-0.5, -1.0), candidate(-3.0), candidate(-9.0)
    shown = Best(candidates=2, shown=1).of(Collected((likely, longer, unlikely, other)))
    assert shown == (longer, unlikely)


async def test_model_without_tokens_for_it_does_not_fill_in(client: httpx.AsyncClient) -> None:
    assert await refused(client, suffix="the end") == "suffix"


@pytest.fixture
async def filling(tmp_path: Path) -> AsyncIterator[tuple[Parts, httpx.AsyncClient]]:
    """A server whose model knows StarCoder's tokens."""
    write_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    options = {"script": WordScript(backend), "vocab_size": backend.get_vocab_size(), "max_model_len": 512}
    config = Config(model="/models/fake", engine="thread")
    async with running(tmp_path, config, **options) as parts, client_of(parts.app) as client:
        yield parts, client


async def test_suffix_is_put_where_the_model_expects_it(
    filling: tuple[Parts, httpx.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, client = filling
    submitted: list[Any] = []
    generate = parts.engine.generate
    monkeypatch.setattr(parts.engine, "generate", lambda submit: submitted.append(submit) or generate(submit))
    [choice] = (await ask(client, prompt="one two", suffix="four five"))["choices"]
    assert choice["finish_reason"] == "length"
    tokenizer = parts.tokenizer
    pre, suf, mid, end = (
        tokenizer.token_id(piece) for piece in ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>")
    )
    before, behind = (tokenizer.encode(text, add_special_tokens=False) for text in ("one two", "four five"))
    expected = (pre, *before, suf, *behind, mid)
    assert submitted[0].prompt.token_ids[-len(expected) :] == expected
    assert {mid, end} <= set(submitted[0].sampling.stop_token_ids)
    assert await refused(client, suffix="x", echo=True) == "suffix"
