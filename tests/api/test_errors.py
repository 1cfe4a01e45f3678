"""Whatever goes wrong, the caller gets one JSON object that says what."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures_server import LiveServer, Parts, client_of, running

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["detail"] == body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


async def test_malformed_json_is_located(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(CHAT, content=b'{"messages": ['), 400)
    assert error["code"] == "invalid_json"
    assert "column 14" in error["message"]


async def test_unknown_field_is_named(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(CHAT, json={**BODY, "max_token": 3}), 400)
    assert (error["param"], error["type"]) == ("max_token", "invalid_request_error")
    assert "max_tokens" in error["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/tokenize"])
async def test_compressed_body_is_415(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post(path, content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "content-encoding 'gzip'" in answer.json()["error"]["message"]


async def test_unknown_path_is_404(client: httpx.AsyncClient) -> None:
    assert "/v1/nothing" in error_of(await client.post("/v1/nothing", json={}), 404)["message"]


async def test_wrong_method_is_405_and_names_the_right_one(client: httpx.AsyncClient) -> None:
    answer = await client.get(CHAT)
    assert "GET" in error_of(answer, 405)["message"]
    assert answer.headers["allow"] == "POST"


async def test_unexpected_error_is_hidden_and_logged_once(
    parts: Parts, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise LookupError("private detail")

    monkeypatch.setattr(parts.service, "chat", explode)
    with caplog.at_level(logging.ERROR, "vllm_mlx.api"):
        answer = await client.post(CHAT, json=BODY)
    error = error_of(answer, 500)
    assert "private detail" not in answer.text
    (record,) = [record for record in caplog.records if record.name == "vllm_mlx.api"]
    assert record.exc_info is not None
    assert answer.headers["x-request-id"] in error["message"]


async def test_loading_model_is_503_with_retry_after(folder: Path, config: Config) -> None:
    parts = Parts(folder, config)
    async with client_of(parts.app) as client:
        answer = await client.post(CHAT, json=BODY)
        assert error_of(answer, 503)["code"] == "server_busy"
        assert int(answer.headers["retry-after"]) >= 1
        health = await client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "loading"
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503


async def test_full_queue_is_503_with_retry_after(folder: Path, runner_options: dict[str, Any]) -> None:
    config = Config(model="m", max_num_seqs=1, max_waiting=1)
    async with running(folder, config, **{**runner_options, "step_s": 0.005}) as parts, client_of(parts.app) as client:
        for is_stream in (False, True):
            body = {**BODY, "max_tokens": 25, "stream": is_stream}
            answers = await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(4)))
            assert {answer.status_code for answer in answers} == {200, 503}
            rejected = next(answer for answer in answers if answer.status_code == 503)
            assert error_of(rejected, 503)["type"] == "overloaded_error"
            assert int(rejected.headers["retry-after"]) >= 1


async def test_timeout_is_504(folder: Path, config: Config, runner_options: dict[str, Any]) -> None:
    async with running(folder, config, **{**runner_options, "step_s": 0.02}) as parts, client_of(parts.app) as client:
        answer = await client.post(CHAT, json={**BODY, "max_tokens": 300, "timeout": 0.1})
        assert error_of(answer, 504)["code"] == "timeout"
        await parts.idle()


class Failing:
    """A model that breaks after some tokens."""

    def __init__(self, num_tokens: int) -> None:
        self._num_left = num_tokens

    def __call__(self, tokens: tuple[int, ...]) -> int:
        self._num_left -= 1
        if self._num_left < 0:
            raise RuntimeError("out of memory")
        return 70


@pytest.fixture
async def failing(folder: Path, config: Config, runner_options: dict[str, Any]) -> AsyncIterator[Parts]:
    async with running(folder, config, **{**runner_options, "script": Failing(3)}) as parts:
        yield parts


async def test_error_in_a_stream_is_its_last_event(failing: Parts) -> None:
    async with client_of(failing.app) as client:
        answer = await client.post(CHAT, json={**BODY, "stream": True, "max_tokens": 50})
    assert answer.status_code == 200
    *_, last, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert error["message"]
    assert 'finish_reason":"' not in answer.text


async def test_health_tells_that_the_engine_is_gone(failing: Parts) -> None:
    async with client_of(failing.app) as client:
        error_of(await client.post(CHAT, json={**BODY, "max_tokens": 50}), 503)
        health = await client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "unhealthy"
        assert health.json()["engine"]["reason"]
        assert (await client.get("/livez")).status_code == 503
        answer = await client.post(CHAT, json=BODY)
        error_of(answer, 503)
        assert "retry-after" in answer.headers


async def test_large_body_is_413(serve: Callable[..., LiveServer]) -> None:
    server = serve(Config(model="m", max_body_mb=1))
    big = b'{"messages": "' + b"x" * (8 * 1024 * 1024) + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(big), 65536):
            yield big[start : start + 65536]

    async with httpx.AsyncClient(base_url=server.url) as client:
        for content in (big, pieces()):
            assert "--max-body-mb" in error_of(await client.post(CHAT, content=content), 413)["message"]
        fits = {**BODY, "user": "x" * 1000_000}
        assert (await client.post(CHAT, json=fits)).status_code == 200


def test_client_that_sends_all_before_it_reads_gets_the_413(serve: Callable[..., LiveServer]) -> None:
    server = serve(Config(model="m", max_body_mb=1))
    request = urllib.request.Request(server.url + CHAT, data=b"x" * (8 * 1024 * 1024))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    with caught.value as answer:
        assert answer.code == 413
