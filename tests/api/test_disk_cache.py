"""The cache on disk as clients see it, over the whole server but for the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fixtures_server import TIMEOUT_S, Parts, client_of, running, until
from prometheus_client.parser import text_string_to_metric_families

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import DiskStats, EngineStatus, Stats
from vllm_mlx.core.step import MemoryUse
from vllm_mlx.engine import engine
from vllm_mlx.kv.tiers.folder import BlobFolder

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the river " * 8
MESSAGES = [{"role": "user", "content": TEXT}]
KINDS: dict[str, dict[str, Any]] = {
    "pages": {},
    "rows": {"num_pages": 0},
    "pages and state": {"state": Layout.STATE},
}


@pytest.fixture
def stored(tmp_path: Path) -> Config:
    """Settings with a cache on disk."""
    return Config(
        model="/models/fake",
        engine="thread",
        ssd_cache_dir=str(tmp_path / "cache"),
        ssd_cache_min_free_gb=0,
    )


@pytest.fixture
def options(runner_options: dict[str, Any]) -> dict[str, Any]:
    """A fake model whose state may be kept."""
    return {**runner_options, "fingerprint": b"fingerprint-of-x"}


@pytest.fixture
def reports_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that rests tells at once what the disk did meanwhile."""
    for name in ("REST_AFTER_S", "DISK_REPORT_INTERVAL_S"):
        monkeypatch.setattr(engine, name, 0.02)


async def ask(client: httpx.AsyncClient, messages: Any = MESSAGES) -> int:
    """Tokens that were found."""
    answer = await client.post(CHAT, json={"messages": messages, "max_tokens": 3, "temperature": 0})
    assert answer.status_code == 200, answer.text
    return int(answer.headers["x-cache-hit-tokens"])


async def get(client: httpx.AsyncClient, path: str) -> Any:
    return (await client.get(path)).json()


async def disk_of(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await get(client, "/v1/cache/stats"))["disk"]
    return found


async def loaded(parts: Parts) -> None:
    """Wait until the engine has told that it loaded something, and that it rests."""
    await until(lambda: _disk(parts).num_hits and not parts.status().stats.busy)


async def fill(folder: Path, config: Config, options: dict[str, Any]) -> None:
    """A server's life in which a prompt was used twice."""
    async with running(folder, config, **options) as parts, client_of(parts.app) as client:
        await ask(client)
        await ask(client)


@pytest.mark.parametrize("kind", KINDS)
async def test_first_request_after_a_restart_is_served_from_the_disk(
    kind: str, folder: Path, stored: Config, options: dict[str, Any]
) -> None:
    options |= KINDS[kind]
    await fill(folder, stored, options)
    async with running(folder, stored, **options) as parts, client_of(parts.app) as client:
        explained = (await client.post("/v1/cache/explain", json={"messages": MESSAGES})).json()
        assert explained["found_in_memory"] == 0
        assert explained["found_on_disk"] == explained["found_tokens"] >= 64
        assert await ask(client) == explained["found_tokens"]
        await loaded(parts)
        found = await disk_of(client)
        assert found["blobs"] >= found["hits"] > 0
        assert found["bytes"] > found["bytes_read"] > 0
        assert (found["misses"], found["corrupt"], found["ahead_bytes"], found["problem"]) == (0, 0, 0, None)
        explained = (await client.post("/v1/cache/explain", json={"messages": MESSAGES})).json()
        assert (explained["found_on_disk"], explained["reason"]) == (0, "hit")


@pytest.mark.usefixtures("reports_soon")
async def test_what_is_written_is_counted_once_it_is_written(
    folder: Path, stored: Config, options: dict[str, Any]
) -> None:
    async with running(folder, stored, **options) as parts, client_of(parts.app) as client:
        await ask(client)
        assert (await disk_of(client))["saved"] == 0  # most prompts never come again
        await ask(client)
        await until(lambda: _disk(parts).num_saved and not _disk(parts).queued_bytes)
        found = await disk_of(client)
        assert found["blobs"] == found["saved"] > 0
        assert found["bytes"] == found["bytes_written"] == _size(Path(stored.ssd_cache_dir or ""))
        await ask(client)
        assert (await disk_of(client))["saved"] == found["saved"]


async def test_metrics_tell_what_the_statistics_tell(folder: Path, stored: Config, options: dict[str, Any]) -> None:
    await fill(folder, stored, options)
    async with running(folder, stored, **options) as parts, client_of(parts.app) as client:
        await ask(client)
        await loaded(parts)
        found, samples = await disk_of(client), await _scrape(client)
        prefix = "vllm_mlx_disk_cache_"
        for name in ("blobs", "bytes", "queued_bytes", "ahead_bytes"):
            assert samples[prefix + name] == found[name]
        for name in ("saved", "hits", "misses", "corrupt", "evicted"):
            assert samples[f"{prefix}{name}_total"] == found[name]
        assert samples[f"{prefix}read_bytes_total"] == found["bytes_read"] > 0
        assert samples[f"{prefix}written_bytes_total"] == found["bytes_written"]
        assert samples[f"{prefix}failing"] == 0
        assert found["refused"] == {"known": found["hits"]}  # they are shared now, but stored already
        assert samples[f"{prefix}refused_total known"] == found["hits"]


async def test_deleting_the_cache_empties_the_disk_and_the_figures(
    folder: Path, stored: Config, options: dict[str, Any]
) -> None:
    options |= KINDS["pages and state"]
    await fill(folder, stored, options)
    async with running(folder, stored, **options) as parts, client_of(parts.app) as client:
        await ask(client)
        await loaded(parts)
        stored_before = (await disk_of(client))["blobs"]
        cleared = (await client.delete("/v1/cache")).json()
        assert cleared["stored"] == stored_before > 0
        assert cleared["pages"] > 0
        assert cleared["checkpoints"] > 0
        stats = await get(client, "/v1/cache/stats")
        assert (stats["disk"]["blobs"], stats["disk"]["bytes"]) == (0, 0)
        assert (stats["pages"]["kept"], stats["pages"]["pinned"], stats["checkpoints"]) == (0, 0, 0)
        assert (await client.delete("/v1/cache")).json() == {"pages": 0, "checkpoints": 0, "stored": 0}
        assert await ask(client) == 0


async def test_request_that_waits_for_the_disk_has_a_status_of_its_own(
    folder: Path, stored: Config, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(folder, stored, options)
    gate = threading.Event()
    monkeypatch.setattr(BlobFolder, "read", _behind(gate, BlobFolder.read))
    async with running(folder, stored, **options) as parts, client_of(parts.app) as client:
        asked = asyncio.create_task(ask(client))
        await until(lambda: parts.status().stats.num_loading)
        status = await get(client, "/v1/status")
        assert status["num_waiting"] == 1
        assert status["waiting"] == {"for_their_turn": 0, "loading_from_disk": 1}
        assert (await get(client, "/v1/cache/stats"))["requests_loading"] == 1
        assert (await _scrape(client))["vllm_mlx_requests_loading"] == 1
        assert await ask(client, [{"role": "user", "content": "short"}]) == 0  # overtakes
        gate.set()
        assert await asked >= 64
        await until(lambda: not parts.status().stats.num_loading)


@pytest.mark.usefixtures("reports_soon")
async def test_disk_that_cannot_be_written_says_why(folder: Path, stored: Config, options: dict[str, Any]) -> None:
    config = Config(**{**_fields(stored), "ssd_cache_min_free_gb": 1e9})
    async with running(folder, config, **options) as parts, client_of(parts.app) as client:
        await ask(client)
        await ask(client)
        await until(lambda: "low_space" in _disk(parts).num_refused)
        found = await disk_of(client)
        assert (found["saved"], found["blobs"]) == (0, 0)
        assert found["refused"]["low_space"] > 0
        assert found["problem"]
        assert (await _scrape(client))["vllm_mlx_disk_cache_failing"] == 1
        assert await ask(client) >= 64


async def test_without_a_disk_there_are_no_figures(client: httpx.AsyncClient) -> None:
    stats = await get(client, "/v1/cache/stats")
    assert (stats["disk"], stats["requests_loading"]) == (None, 0)
    assert not [name for name in await _scrape(client) if "disk_cache" in name]


async def test_staging_is_counted_apart_from_the_devices_memory(
    parts: Parts, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryUse(active=1000, weights=600, rows=100, checkpoints=50, staging=7000)
    status = msgspec.structs.replace(parts.status(), stats=Stats(memory=memory))
    monkeypatch.setattr(parts.engine, "status", lambda: status)
    ledger = (await get(client, "/v1/memory"))["ledger"]
    assert ledger["staging"] == 7000
    assert (ledger["rows"], ledger["checkpoints"], ledger["other"]) == (100, 50, 250)
    told = (await get(client, "/v1/status"))["memory"]
    assert set(told) >= {"rows_gb", "checkpoints_gb", "staging_gb"}


def _disk(parts: Parts) -> DiskStats:
    """Figures as the engine reported them last; zeros before its first report."""
    status: EngineStatus = parts.status()
    return status.stats.disk or DiskStats(*[0] * 11, num_refused={})


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.page"))


def _fields(config: Config) -> dict[str, Any]:
    names = ("model", "engine", "ssd_cache_dir", "ssd_cache_min_free_gb")
    return {name: getattr(config, name) for name in names}


def _behind(gate: threading.Event, call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        assert gate.wait(TIMEOUT_S)
        return call(*given, **named)

    return slow


async def _scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """Values by name, and by name and reason."""
    families = list(text_string_to_metric_families((await client.get("/metrics")).text))
    assert all(family.documentation and family.type not in ("unknown", "untyped") for family in families)
    return {
        " ".join([sample.name, *(value for key, value in sample.labels.items() if key == "reason")]): sample.value
        for family in families
        for sample in family.samples
    }
