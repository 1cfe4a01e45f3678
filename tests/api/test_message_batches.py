"""/v1/messages/batches, driven by Anthropic's own client over the whole server but for the model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from anthropic.types.messages import MessageBatch
from fixtures_server import LiveServer

from vllm_mlx.core.config import Config

TIMEOUT_S = 30.0
SLOW = 2000
"""Tokens of a message that does not end while a test looks at it."""


@pytest.fixture
def server(tmp_path: Path, serve: Callable[..., LiveServer]) -> LiveServer:
    config = Config(model="/models/fake", engine="thread", files_dir=str(tmp_path), batch_concurrency=2)
    return serve(config, max_model_len=4096, step_s=0.002)


@pytest.fixture
def client(server: LiveServer) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as found:
        yield found


def wanted(name: str, **params: Any) -> Any:
    messages = [{"role": "user", "content": "one two three"}]
    return {"custom_id": name, "params": {"model": "default", "max_tokens": 4, "messages": messages, **params}}


def reached(client: Anthropic, batch_id: str, status: str = "ended") -> MessageBatch:
    deadline = time.monotonic() + TIMEOUT_S
    while (found := client.messages.batches.retrieve(batch_id)).processing_status != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def test_each_request_has_its_result(client: Anthropic) -> None:
    wrong, alone = wanted("wrong", top_k="many"), wanted("alone", background=True)
    batch = client.messages.batches.create(requests=[wanted("a"), wrong, wanted("b", max_tokens=2), alone])
    assert batch.id.startswith("msgbatch_")
    assert (batch.processing_status, batch.request_counts.processing) == ("in_progress", 4)
    ended = reached(client, batch.id)
    counts = ended.request_counts
    assert (counts.processing, counts.succeeded, counts.errored, counts.expired) == (0, 2, 2, 0)
    assert ended.ended_at is not None
    results = {line.custom_id: line.result for line in client.messages.batches.results(batch.id)}
    assert results["a"].type == results["b"].type == "succeeded"
    assert results["b"].message.usage.output_tokens == 2
    assert results["wrong"].type == "errored"
    assert results["wrong"].error.error.type == "invalid_request_error"
    assert "top_k" in results["wrong"].error.error.message
    assert "background" in results["alone"].error.error.message


def test_cancelled_batch_says_what_was_never_begun(client: Anthropic) -> None:
    requests = [wanted("first"), *(wanted(f"r{i}", max_tokens=SLOW) for i in range(5))]
    batch = client.messages.batches.create(requests=requests)
    with pytest.raises(anthropic.BadRequestError, match="not ended"):
        client.messages.batches.delete(batch.id)
    cancelled = client.messages.batches.cancel(batch.id)
    assert cancelled.cancel_initiated_at is not None
    counts = reached(client, batch.id).request_counts
    assert counts.canceled >= 3
    assert counts.canceled + counts.succeeded == 6
    kinds = [line.result.type for line in client.messages.batches.results(batch.id)]
    assert kinds.count("canceled") == counts.canceled
    assert client.messages.batches.cancel(batch.id).processing_status == "ended"


def test_batches_are_listed_latest_first_and_deleted(client: Anthropic, server: LiveServer) -> None:
    ids = [client.messages.batches.create(requests=[wanted("a")]).id for _ in range(3)]
    assert [batch.id for batch in client.messages.batches.list(limit=2)] == ids[::-1]
    page = client.messages.batches.list(limit=1, before_id=ids[0])
    assert ([batch.id for batch in page.data], page.has_more) == ([ids[1]], True)
    assert httpx.get(f"{server.url}/v1/batches").json()["data"] == []
    reached(client, ids[0])
    assert client.messages.batches.delete(ids[0]).type == "message_batch_deleted"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.retrieve(ids[0])


@pytest.mark.parametrize(
    ("requests", "name"),
    [
        ([], "requests"),
        ([wanted("a"), wanted("a")], "requests.1.custom_id"),
        ([wanted("a", stream=True)], "requests.0.params.stream"),
        ([{"custom_id": "a b", "params": {}}], "requests.0.custom_id"),
    ],
)
def test_wrong_batch_names_the_field(client: Anthropic, requests: Any, name: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.batches.create(requests=requests)
    assert name in json.dumps(caught.value.body)
