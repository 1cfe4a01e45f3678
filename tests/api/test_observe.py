"""One log line a request, and a name for each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello dear secret"}], "max_tokens": 5}


Lines = Callable[[], list[logging.LogRecord]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """The lines about requests so far."""
    caplog.set_level(logging.INFO, "vllm_mlx.request")
    return lambda: [record for record in caplog.records if record.name == "vllm_mlx.request"]


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return record.__dict__["fields"]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_request_has_one_line(client: httpx.AsyncClient, lines: Lines, is_stream: bool) -> None:
    answer = await client.post(CHAT, json={**BODY, "stream": is_stream})
    (line,) = lines()
    fields = fields_of(line)
    assert line.getMessage() == CHAT
    assert (fields["status"], fields["finish"], fields["tokens_out"]) == (200, "length", 5)
    assert fields["tokens_in"] > 0
    assert fields["id"] in answer.text
    assert {"ttft_s", "duration_s", "cached"} <= set(fields)


async def test_text_is_never_logged(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reply = (await client.post(CHAT, json=BODY)).json()["choices"][0]["message"]["content"]
    await client.post(CHAT, json={**BODY, "temperature": "secret"})
    logged = "".join(f"{record.getMessage()} {record.__dict__.get('fields')}" for record in caplog.records)
    assert "secret" not in logged
    assert reply not in logged


async def test_refused_request_is_logged_with_its_reason(client: httpx.AsyncClient, lines: Lines) -> None:
    await client.post(CHAT, json={**BODY, "temperature": 9})
    fields = fields_of(lines()[-1])
    assert (fields["status"], fields["error"], fields["param"]) == (400, "invalid_value", "temperature")


async def test_looking_at_the_server_is_not_worth_a_line(client: httpx.AsyncClient, lines: Lines) -> None:
    for path in ("/health", "/metrics", "/v1/models"):
        await client.get(path)
    assert lines() == []


async def test_every_answer_is_named(client: httpx.AsyncClient) -> None:
    ids = [(await client.get(path)).headers["x-request-id"] for path in ("/health", "/nothing", CHAT)]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("given", "is_kept"), [("trace-1:a.b_c", True), ("x" * 129, False), ("a b", False), ("a\tb", False), ("", False)]
)
async def test_clients_name_is_kept_if_it_is_sane(client: httpx.AsyncClient, given: str, is_kept: bool) -> None:
    answer = await client.get("/health", headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) is is_kept


async def test_unknown_path_is_logged_on_one_line(client: httpx.AsyncClient, lines: Lines) -> None:
    await client.get("/nothing%0Ahere" + "x" * 500)
    message = lines()[-1].getMessage()
    assert message.startswith("/nothing%0Ahere")
    assert len(message) < 200
