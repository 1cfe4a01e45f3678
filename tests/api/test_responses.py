"""/v1/responses over a fake model, in memory."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures_server import client_of, running

from vllm_mlx.api.wire.responses.body import ResponsesBody
from vllm_mlx.api.wire.sampling import GenerationBody
from vllm_mlx.chat.stream import EventStream
from vllm_mlx.core.config import Config
from vllm_mlx.core.sampling import SamplingParams

pytestmark = pytest.mark.anyio

HI = {"input": "Count from 1 to 200.", "max_output_tokens": 8}


async def make(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/responses", json={**HI, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/responses", json={**HI, **fields})
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; each is sent under the name of its type."""
    found = []
    for part in text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    answer = await client.post("/v1/responses", json={**HI, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    return events_of(answer.text)


async def test_a_response_is_complete(client: httpx.AsyncClient) -> None:
    found = await make(client, metadata={"a": "b"}, instructions="Be brief.", user="u")
    assert (found["object"], found["status"]) == ("response", "incomplete")
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    (message,) = found["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "incomplete")
    assert message["content"][0]["text"]
    assert (found["metadata"], found["instructions"], found["user"]) == ({"a": "b"}, "Be brief.", "u")
    assert found["usage"]["output_tokens"] == 8
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + 8


async def test_a_stream_is_the_same_response(client: httpx.AsyncClient) -> None:
    whole = await make(client, seed=7)
    events = await streamed(client, seed=7)
    assert [event["type"] for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event["type"] for event in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"] == events[-4]["text"]
    last = events[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"]["output_tokens"] == 8


async def test_a_stored_response_is_found_until_it_is_deleted(client: httpx.AsyncClient) -> None:
    made = await make(client)
    assert (await client.get(f"/v1/responses/{made['id']}")).json() == made
    assert (await client.delete(f"/v1/responses/{made['id']}")).json()["deleted"] is True
    assert (await client.get(f"/v1/responses/{made['id']}")).status_code == 404
    assert (await client.delete(f"/v1/responses/{made['id']}")).status_code == 404


async def test_a_response_that_is_not_stored_is_not_found(client: httpx.AsyncClient) -> None:
    made = await make(client, store=False)
    assert made["store"] is False
    assert (await client.get(f"/v1/responses/{made['id']}")).status_code == 404


async def test_going_on_from_a_response_is_sending_its_items_again(client: httpx.AsyncClient) -> None:
    first = await make(client, seed=1)
    text = first["output"][0]["content"][0]["text"]
    second = await make(client, seed=2, previous_response_id=first["id"], input="again")
    by_hand = await make(
        client,
        seed=2,
        store=False,
        input=[
            {"role": "user", "content": HI["input"]},
            {"role": "assistant", "content": text},
            {"role": "user", "content": [{"type": "input_text", "text": "again"}]},
        ],
    )
    assert second["usage"]["input_tokens"] == by_hand["usage"]["input_tokens"]
    assert second["output"][0]["content"] == by_hand["output"][0]["content"]
    third = await make(client, previous_response_id=second["id"], input="and again")
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]


async def test_unknown_previous_response_is_refused(client: httpx.AsyncClient) -> None:
    error = await refused(client, previous_response_id="resp_nope")
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")


async def test_input_items_come_in_pages(client: httpx.AsyncClient) -> None:
    items = [{"role": "user", "content": str(i)} for i in range(5)]
    made = await make(client, input=items)
    path = f"/v1/responses/{made['id']}/input_items"
    first = (await client.get(path, params={"limit": 2, "order": "asc"})).json()
    assert [item["content"][0]["text"] for item in first["data"]] == ["0", "1"]
    assert first["has_more"] is True
    second = (await client.get(path, params={"limit": 3, "order": "asc", "after": first["last_id"]})).json()
    assert [item["content"][0]["text"] for item in second["data"]] == ["2", "3", "4"]
    assert second["has_more"] is False
    newest = (await client.get(path)).json()
    assert newest["first_id"] == second["last_id"]
    assert (await client.get(path, params={"after": "nope"})).status_code == 400


async def test_an_item_can_be_named_instead_of_sent(client: httpx.AsyncClient) -> None:
    made = await make(client, seed=3)
    said = made["output"][0]
    named = await make(
        client, seed=4, input=[{"type": "item_reference", "id": said["id"]}, {"role": "user", "content": "x"}]
    )
    sent = await make(client, seed=4, input=[said, {"role": "user", "content": "x"}])
    assert named["output"][0]["content"] == sent["output"][0]["content"]
    answer = await client.post("/v1/responses", json={"input": [{"id": "msg_nope"}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "input.0.id")


async def test_logprobs_are_in_the_text(client: httpx.AsyncClient) -> None:
    made = await make(client, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = made["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 8
    assert all(len(one["top_logprobs"]) == 2 for one in logprobs)
    events = await streamed(client, include=["message.output_text.logprobs"])
    assert sum(len(event.get("logprobs", [])) for event in events if event["type"].endswith("text.delta")) == 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "code_interpreter"}]}, "tools.0"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"background": True, "store": False}, "background"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"n": 2}, "n"),
        ({"max_tokens": 8}, "max_tokens"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]},
            "input.0.output.0",
        ),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input"),
        ({"previous_response_id": "a", "conversation": "b"}, "previous_response_id"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"service_tier": "flux"}, "service_tier"),
    ],
)
async def test_what_is_not_honoured_is_refused_by_name(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    assert (await refused(client, **fields))["param"] == param


def test_no_shared_field_is_passed_over() -> None:
    """A field that all generating endpoints share is honoured here too, or has a word of its own in the body."""
    sampled = {name for name in SamplingParams.__struct_fields__ if name not in ("grammar", "n", "max_tokens")}
    honoured = {"model", "stream", "stream_options", "timeout", "priority", "cache_report", "user"}
    refused = {"n", "max_tokens"}
    assert set(GenerationBody.model_fields) <= sampled | honoured | refused
    assert all(ResponsesBody.model_fields[name].annotation is type(None) for name in refused)


async def test_input_too_long_is_refused_or_cut(client: httpx.AsyncClient) -> None:
    turns = [{"role": role, "content": f"turn {i} " * 10} for i in range(12) for role in ("user", "assistant")]
    items = [{"role": "developer", "content": "be"}, *turns, {"role": "user", "content": "last"}]
    error = await refused(client, input=items)
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    made = await make(client, input=items, truncation="auto")
    assert 300 < made["usage"]["input_tokens"] <= 512 - 8
    only = await refused(client, input="word " * 600, truncation="auto")
    assert only["code"] == "context_length_exceeded"


async def test_input_tokens_are_those_of_the_response(client: httpx.AsyncClient) -> None:
    made = await make(client, instructions="x")
    body = {"input": HI["input"], "instructions": "x"}
    counted = (await client.post("/v1/responses/input_tokens", json=body)).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": made["usage"]["input_tokens"]}


async def test_a_failure_is_the_last_event(folder: Path, config: Config, runner_options: dict[str, Any]) -> None:
    async with running(folder, config, **{**runner_options, "step_s": 0.02}) as parts, client_of(parts.app) as client:
        events = await streamed(client, max_output_tokens=300, timeout=0.2)
        failed = events[-1]
        assert failed["type"] == "response.failed"
        assert failed["response"]["status"] == "failed"
        assert "timeout" in failed["response"]["error"]["message"]
        stored = (await client.get(f"/v1/responses/{failed['response']['id']}")).json()
        assert stored == failed["response"]
        await parts.idle()


# ---- background ----


@pytest.fixture
async def slow(folder: Path, config: Config, runner_options: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server whose model takes its time."""
    async with running(folder, config, **{**runner_options, "step_s": 0.01}) as parts, client_of(parts.app) as found:
        yield found
        await parts.idle()


async def finished(client: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    while True:
        found: dict[str, Any] = (await client.get(f"/v1/responses/{response_id}")).json()
        if found["status"] not in ("queued", "in_progress"):
            return found
        await asyncio.sleep(0.01)


async def test_a_background_response_goes_on_alone(slow: httpx.AsyncClient) -> None:
    made = await make(slow, background=True)
    assert (made["status"], made["background"], made["output"]) == ("queued", True, [])
    done = await finished(slow, made["id"])
    assert done["status"] == "incomplete"
    assert done["usage"]["output_tokens"] == 8
    assert (await slow.post(f"/v1/responses/{made['id']}/cancel")).json() == done


async def test_a_background_stream_is_followed_from_any_event(slow: httpx.AsyncClient) -> None:
    events = await streamed(slow, background=True, max_output_tokens=20)
    assert [event["type"] for event in events[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    path = f"/v1/responses/{events[0]['response']['id']}"
    replayed = await slow.get(path, params={"stream": True, "starting_after": 4})
    assert [json.loads(part.split("data: ")[1]) for part in replayed.text.split("\n\n") if part] == events[5:]
    running = await make(slow, background=True, max_output_tokens=20)
    followed = await slow.get(f"/v1/responses/{running['id']}", params={"stream": True})
    assert events_of(followed.text)[-1]["type"] == "response.incomplete"


async def test_a_background_response_is_cancelled(slow: httpx.AsyncClient) -> None:
    made = await make(slow, background=True, max_output_tokens=400)
    cancelled = (await slow.post(f"/v1/responses/{made['id']}/cancel")).json()
    assert cancelled["status"] == "cancelled"
    assert (await slow.get(f"/v1/responses/{made['id']}")).json()["status"] == "cancelled"
    other = await make(slow, background=True, max_output_tokens=400)
    assert (await slow.delete(f"/v1/responses/{other['id']}")).status_code == 200
    assert (await slow.get(f"/v1/responses/{other['id']}")).status_code == 404


async def test_what_has_ended_is_stored_although_it_is_cancelled(
    slow: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = EventStream.aclose

    async def close_slowly(events: EventStream) -> None:
        await asyncio.sleep(0.2)
        await close(events)

    monkeypatch.setattr(EventStream, "aclose", close_slowly)
    made = await make(slow, background=True, max_output_tokens=2)
    done = await finished(slow, made["id"])
    assert (await slow.post(f"/v1/responses/{made['id']}/cancel")).json() == done
    assert (await slow.get(f"/v1/responses/{made['id']}")).json() == done


async def test_a_follower_of_a_cancelled_response_gets_a_last_event(slow: httpx.AsyncClient) -> None:
    made = await make(slow, background=True, max_output_tokens=400)
    path = f"/v1/responses/{made['id']}"
    following = asyncio.create_task(slow.get(path, params={"stream": True}))
    while not (await slow.get(path)).json()["output"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    cancelled = (await slow.post(f"{path}/cancel")).json()
    events = events_of((await following).text)
    assert (events[-1]["type"], events[-1]["response"]) == ("response.incomplete", cancelled)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events_of((await slow.get(path, params={"stream": True})).text) == events
    assert cancelled["output"][0]["status"] == "incomplete"


async def test_only_background_responses_are_cancelled_or_followed(client: httpx.AsyncClient) -> None:
    path = f"/v1/responses/{(await make(client))['id']}"
    assert (await client.post(path + "/cancel")).status_code == 400
    assert (await client.get(path, params={"stream": True})).status_code == 400
    assert (await client.get(path, params={"starting_after": 1})).status_code == 400


async def test_a_restart_keeps_responses_and_fails_what_ran(
    folder: Path, config: Config, runner_options: dict[str, Any], tmp_path: Path
) -> None:
    stored = dataclasses.replace(config, response_store=str(tmp_path / "responses.db"))
    async with running(folder, stored, **runner_options) as parts, client_of(parts.app) as client:
        kept = await make(client)
        body = {**kept, "id": "resp_cut", "status": "in_progress"}
        parts.app.state.responses.put("resp_cut", json.dumps(body).encode(), tenant=b"")
    async with running(folder, stored, **runner_options) as parts, client_of(parts.app) as client:
        assert (await client.get(f"/v1/responses/{kept['id']}")).json() == kept
        cut = (await client.get("/v1/responses/resp_cut")).json()
        assert (cut["status"], cut["error"]["code"]) == ("failed", "server_error")


async def test_tenants_do_not_see_each_others_responses(
    folder: Path, config: Config, runner_options: dict[str, Any]
) -> None:
    with_tenants = dataclasses.replace(config, cache_tenant_header="x-tenant")
    async with running(folder, with_tenants, **runner_options) as parts, client_of(parts.app) as client:
        made = (await client.post("/v1/responses", json=HI, headers={"x-tenant": "a"})).json()
        path = f"/v1/responses/{made['id']}"
        assert (await client.get(path, headers={"x-tenant": "a"})).status_code == 200
        assert (await client.get(path, headers={"x-tenant": "b"})).status_code == 404
        assert (await client.delete(path)).status_code == 404
