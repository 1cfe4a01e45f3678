"""The cache as clients see it: headers, reports, /v1/cache and /v1/memory, over the whole server but for the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures_server import Parts, client_of, running, until

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
SYSTEM = "you are helpful and the quick brown fox jumps over the lazy dog and runs away from the river " * 3


def messages(text: str, *, system: str = SYSTEM, name: str) -> list[dict[str, str]]:
    """A conversation whose system text is this test's own, for the server is shared."""
    return [{"role": "system", "content": f"{name} {system}"}, {"role": "user", "content": text}]


async def post(client: httpx.AsyncClient, path: str, body: Any, **headers: str) -> httpx.Response:
    answer = await client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


async def ask(client: httpx.AsyncClient, conversation: Any, **fields: Any) -> httpx.Response:
    return await post(client, CHAT, {"messages": conversation, "max_tokens": 3, "temperature": 0, **fields})


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(block.removeprefix("data: ")) for block in answer.text.split("\n\n")[:-2]]


async def test_every_answer_says_in_a_header_how_much_was_found(client: httpx.AsyncClient) -> None:
    conversation = messages("one", name="header")
    assert (await ask(client, conversation)).headers["x-cache-hit-tokens"] == "0"
    for stream in (False, True):
        answer = await ask(
            client, conversation, stream=stream, stream_options={"include_usage": True} if stream else None
        )
        hit = int(answer.headers["x-cache-hit-tokens"])
        usage = chunks_of(answer)[-1]["usage"] if stream else answer.json()["usage"]
        assert hit == usage["prompt_tokens_details"]["cached_tokens"] >= 32
    completion = {"prompt": [SYSTEM, SYSTEM, "short"], "max_tokens": 2, "stream": True}
    await post(client, "/v1/completions", completion)
    again = await post(client, "/v1/completions", {**completion, "stream": False, "n": 2})
    assert int(again.headers["x-cache-hit-tokens"]) >= 2 * 32


async def test_report_comes_only_when_asked_for(client: httpx.AsyncClient) -> None:
    conversation = messages("one", name="report")
    assert "cache" not in (await ask(client, conversation)).json()
    report = (await ask(client, conversation, cache_report=True)).json()["cache"]
    assert report["reason"] == "hit"
    assert 32 <= report["hit_tokens"] < report["prompt_tokens"]
    other = (await ask(client, messages("two", name="report"), cache_report=True)).json()["cache"]
    assert other["reason"] == "different_messages"
    assert (other["difference"]["given"][:3], other["difference"]["earlier"][:3]) == ("two", "one")


@pytest.mark.parametrize("include_usage", [False, True])
async def test_stream_ends_with_the_report(client: httpx.AsyncClient, include_usage: bool) -> None:
    conversation = messages("one", name=f"stream {include_usage}")
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    *chunks, last = chunks_of(await ask(client, conversation, stream=True, cache_report=True, **options))
    assert not any("cache" in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["cache"]["prompt_tokens"] > 32
    assert ("usage" in last) is include_usage


async def test_explanation_names_the_texts_that_differ_and_computes_nothing(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    before = parts.status().stats.num_tokens
    await ask(client, messages("one", name="explain"))
    await until(lambda: parts.status().stats.num_tokens > before and not parts.status().stats.busy)
    num_tokens = parts.status().stats.num_tokens
    body = {"messages": messages("two", name="explain")}
    found = (await post(client, "/v1/cache/explain", body)).json()
    assert found["reason"] == "different_messages"
    assert found["found_tokens"] == found["found_in_memory"] >= 32
    assert found["found_tokens"] <= found["seen_tokens"] < found["prompt_tokens"]
    assert (found["difference"]["given"][:3], found["difference"]["earlier"][:3]) == ("two", "one")
    assert found["tenant"] is None
    assert parts.status().stats.num_tokens == num_tokens
    system = messages("one", system=SYSTEM.replace("river", "forest"), name="explain")
    assert (await post(client, "/v1/cache/explain", {"messages": system})).json()["reason"] == "different_system"


async def test_explanation_names_a_date_that_changed(client: httpx.AsyncClient) -> None:
    await ask(client, messages("hello", system=SYSTEM + "Today is 2026-11-21.", name="date"))
    body = {"messages": messages("hello", system=SYSTEM + "Today is 2026-11-22.", name="date")}
    found = (await post(client, "/v1/cache/explain", body)).json()
    assert (found["reason"], found["difference"]["field"]) == ("volatile_field", "date")


async def test_warm_prompt_is_found_by_the_first_request(client: httpx.AsyncClient) -> None:
    conversation = messages("hello", name="warm")
    body = {"prompts": [conversation[:1], conversation[:1]]}
    warmed = (await post(client, "/v1/cache/warm", body)).json()["prompts"]
    assert warmed[0]["cached_tokens"] == 0
    assert warmed[1]["cached_tokens"] >= 32
    hit = int((await ask(client, conversation)).headers["x-cache-hit-tokens"])
    assert warmed[0]["prompt_tokens"] // 32 * 32 <= hit <= warmed[0]["prompt_tokens"]


async def test_chat_request_can_be_warmed_as_it_is(client: httpx.AsyncClient) -> None:
    conversation = messages("hello", name="as it is")
    body = {"messages": conversation, "max_tokens": 400, "n": 3, "stream": True}
    [warmed] = (await post(client, "/v1/cache/warm", body)).json()["prompts"]
    assert warmed["cached_tokens"] == 0
    assert int((await ask(client, conversation)).headers["x-cache-hit-tokens"]) >= 32


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [[{"role": "user", "content": "a"}], []]}, "prompts.1"),
        ({"prompts": [[{"role": "user", "content": 5}]]}, "prompts.0.0.content"),
        ({"prompts": [[{"role": "assistant"}]]}, "prompts.0.0.content"),
        ({"prompts": [[{"role": "user", "content": "a"}]], "n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"model": "other-9", "prompts": [[{"role": "user", "content": "a"}]]}, "model"),
    ],
)
async def test_wrong_warm_body_is_refused_by_field(client: httpx.AsyncClient, body: Any, param: str) -> None:
    answer = await client.post("/v1/cache/warm", json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


async def test_cleared_cache_explains_the_next_miss(folder: Path, config: Config, runner_options: Any) -> None:
    async with running(folder, config, **runner_options) as parts, client_of(parts.app) as client:
        conversation = messages("hello", name="clear")
        await ask(client, conversation)
        cleared = (await client.request("DELETE", "/v1/cache")).json()
        assert cleared["pages"] >= 1
        assert (await client.get("/v1/cache/stats")).json()["requests"] == 1
        report = (await ask(client, conversation, cache_report=True)).json()["cache"]
        assert (report["hit_tokens"], report["reason"]) == (0, "evicted")


async def test_statistics_count_what_was_saved(folder: Path, config: Config, runner_options: Any) -> None:
    async with running(folder, config, **runner_options) as parts, client_of(parts.app) as client:
        conversation = messages("hello", name="stats")
        answers = [await ask(client, conversation, n=2) for _ in range(2)]
        usage = answers[1].json()["usage"]
        found = (await client.get("/v1/cache/stats")).json()
        assert (found["requests"], found["requests_with_hit"], found["request_hit_rate"]) == (2, 1, 0.5)
        assert found["prompt_tokens"] == 2 * usage["prompt_tokens"]
        assert found["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
        assert found["pages"]["tokens_per_page"] == 32
        assert found["pages"]["total"] >= found["pages"]["free"] + found["pages"]["used"] >= 1


async def test_tenants_are_told_apart_by_the_header(folder: Path, runner_options: Any) -> None:
    config = Config(model="/models/fake", engine="thread", cache_tenant_header="X-Tenant")
    async with running(folder, config, **runner_options) as parts, client_of(parts.app) as client:
        body = {"messages": messages("hello", name="tenant"), "max_tokens": 2}

        async def hit(**headers: str) -> int:
            return int((await post(client, CHAT, body, **headers)).headers["x-cache-hit-tokens"])

        assert await hit(**{"x-tenant": "one"}) == 0
        assert await hit(**{"x-tenant": "one"}) >= 32
        assert await hit(**{"x-tenant": "two"}) == 0
        assert await hit() == 0
        assert await hit() >= 32
        explained = (
            await post(client, "/v1/cache/explain", {"messages": body["messages"]}, **{"x-tenant": "3"})
        ).json()
        assert (explained["reason"], explained["seen_tokens"]) == ("never_seen", 0)
        assert len(explained["tenant"]) == 8


async def test_ledger_adds_up_to_what_is_active(client: httpx.AsyncClient, parts: Parts) -> None:
    await ask(client, messages("hello", name="ledger"))
    await until(lambda: parts.status().stats.pages_kept)
    found = (await client.get("/v1/memory")).json()
    ledger = dict(found["ledger"])
    ledger.pop("allocator_cache")
    ledger.pop("staging")
    info = parts.status().info
    assert info is not None
    assert found["bounds"]["page_bytes"] == info.num_pages * info.cache.page_bytes > 0
    assert ledger["pages_used"] + ledger["pages_kept"] + ledger["pages_free"] == found["bounds"]["page_bytes"]
    assert ledger["pages_kept"] >= info.cache.page_bytes
    assert sum(ledger.values()) >= found["active_bytes"]
    assert set(found["bounds"]) >= {"gpu_memory_utilization", "cache_memory_mb", "cache_memory_percent"}


async def test_server_that_warms_is_not_ready_but_answers(client: httpx.AsyncClient, parts: Parts) -> None:
    with parts.app.state.lifecycle.warming():
        assert (await client.get("/readyz")).status_code == 503
        await ask(client, messages("hello", name="warming"))
    assert (await client.get("/readyz")).status_code == 200
