"""What Prometheus reads."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fixtures_server import Parts, client_of, running, until
from prometheus_client.parser import text_string_to_metric_families

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import KernelStatus
from vllm_mlx.testing.fake import FakeRunner

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
async def parts(folder: Path, config: Config, runner_options: dict[str, Any]) -> AsyncIterator[Parts]:
    """A server that has counted nothing."""
    async with running(folder, config, **runner_options) as found:
        yield found


@pytest.fixture
async def client(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(parts.app) as found:
        yield found


async def scrape(client: httpx.AsyncClient) -> Samples:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.documentation and family.type not in ("unknown", "untyped") for family in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples["vllm_mlx_" + name, tuple(sorted(labels.items()))]


async def test_counters_add_up(client: httpx.AsyncClient) -> None:
    answers = [await client.post(CHAT, json=BODY) for _ in range(3)]
    await client.post(CHAT, json={**BODY, "stream": True})
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "n": 2})
    await client.post(CHAT, json={"messages": []})
    samples = await scrape(client)
    prompt_tokens = answers[0].json()["usage"]["prompt_tokens"]
    assert value(samples, "requests_total", endpoint=CHAT, status="200") == 4
    assert value(samples, "requests_total", endpoint=CHAT, status="400") == 1
    assert value(samples, "generation_tokens_total") == 4 * 5 + 2 * 2
    assert value(samples, "prompt_tokens_total") == 4 * prompt_tokens + 1
    assert value(samples, "time_to_first_token_seconds_count") == 5
    assert value(samples, "request_queue_time_seconds_count") == 6
    assert value(samples, "request_duration_seconds_count", endpoint=CHAT) == 4
    assert value(samples, "inter_token_latency_seconds_count") == 4 * 4 + 2
    assert value(samples, "http_requests_in_flight") == 1


async def test_engine_is_read_at_the_time_of_the_scrape(parts: Parts, client: httpx.AsyncClient) -> None:
    before = await scrape(client)
    await client.post(CHAT, json=BODY)
    await until(lambda: parts.status().stats.num_tokens and not parts.status().stats.pages_used)
    after = await scrape(client)
    assert value(after, "engine_steps_total") > value(before, "engine_steps_total")
    assert value(after, "model_loaded") == 1
    assert value(after, "engine_type", engine_type="batched") == 1
    assert value(after, "pages_free") > 0
    for name in ("pages_used", "requests_running", "requests_waiting", "preemptions_total", "engine_restarts_total"):
        assert value(after, name) == 0
    assert ("vllm_mlx_engine_memory_bytes", (("kind", "active"),)) in after


async def test_kernels_are_told_live_or_not(
    folder: Path, config: Config, runner_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = (KernelStatus("decode 128", error=1e-3), KernelStatus("decode 64", "differs", 0.5))
    same_name = KernelStatus("decode 64")
    info = msgspec.structs.replace(FakeRunner(**runner_options).info, kernels=(*kernels, same_name))
    monkeypatch.setattr(FakeRunner, "info", property(lambda self: info))
    async with running(folder, config, **runner_options) as parts, client_of(parts.app) as client:
        samples, text = await scrape(client), (await client.get("/metrics")).text
        status = (await client.get("/v1/status")).json()
    assert value(samples, "kernel_live", kernel="decode 128") == 1
    assert value(samples, "kernel_live", kernel="decode 64") == 0
    assert text.count('vllm_mlx_kernel_live{kernel="decode 64"}') == 1
    assert status["kernels"][:2] == [
        {"name": "decode 128", "live": True, "problem": None, "error": 1e-3},
        {"name": "decode 64", "live": False, "problem": "differs", "error": 0.5},
    ]


async def test_without_a_gpu_there_are_no_kernels(client: httpx.AsyncClient) -> None:
    assert not [name for name, _ in await scrape(client) if name == "vllm_mlx_kernel_live"]
    assert (await client.get("/v1/status")).json()["kernels"] == []


async def test_no_series_grows_with_unknown_paths_or_models(client: httpx.AsyncClient) -> None:
    await client.get("/no/such/path")
    await client.get("/v1/models/none")
    before = await scrape(client)
    for number in range(5):
        await client.get(f"/no/such/path/{number}")
        await client.get(f"/v1/models/none{number}")
    after = await scrape(client)
    new = {key for key in after.keys() - before.keys() if dict(key[1]).get("endpoint") != "/metrics"}
    assert new == set()
    assert value(after, "requests_total", endpoint="unknown", status="404") == 6
    assert value(after, "requests_total", endpoint="/v1/models/{model_id:path}", status="404") == 6


async def test_histograms_end_at_infinity(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=BODY)
    samples = await scrape(client)
    bounds = [float(dict(labels)["le"]) for name, labels in samples if name.endswith("_seconds_bucket")]
    assert math.inf in bounds
    assert value(samples, "time_to_first_token_seconds_bucket", le="+Inf") == 1


async def test_status_repeats_the_totals(parts: Parts, client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=BODY)
    await until(lambda: parts.status().stats.num_tokens and not parts.status().stats.pages_used)
    status = (await client.get("/v1/status")).json()
    assert status["status"] == "running"
    assert status["total_completion_tokens"] == 5
    assert status["total_prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert (status["num_running"], status["num_waiting"], status["pages_used"]) == (0, 0, 0)
