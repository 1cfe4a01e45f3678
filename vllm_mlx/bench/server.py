"""What the server under test says about itself, and the few things that a benchmark asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_mlx.bench import metrics
from vllm_mlx.bench.client import error_text
from vllm_mlx.bench.http import Answer, BrokenOff, ConnectionFailed, HttpClient, TimedOut
from vllm_mlx.core.errors import VllmMlxError

Facts = dict[str, Any]
"""Result field -> value. What the server does not tell is absent."""

_SOURCES: Mapping[str, tuple[str, ...]] = {
    "chip": ("status.hardware.chip", "health.hardware.chip", "health.engine.device"),
    "gpu_cores": ("status.hardware.gpu_cores", "health.hardware.gpu_cores"),
    "memory_gb": ("status.hardware.memory_gb", "health.hardware.memory_gb"),
    "bandwidth_gbs": ("status.hardware.bandwidth_gbs", "health.hardware.bandwidth_gbs"),
    "os_version": ("status.hardware.os_version", "health.hardware.os_version"),
    "backend": ("health.engine.backend",),
    "dtype": ("health.engine.dtype",),
    "server_version": ("health.version", "status.version"),
    "model_type": ("health.model_type", "status.model_type"),
    "engine_type": ("health.engine_type", "status.engine_type"),
    "mtp_enabled": ("status.mtp.enabled", "status.mtp_enabled"),
    "specprefill": ("status.specprefill.enabled", "status.specprefill"),
    "kv_quant": ("status.kv_quant", "status.cache.kv_quant"),
    "cache_type": ("status.cache.type", "status.cache_type"),
}
"""Result field -> where servers put it, in the answers of /health and /v1/status."""
_MEMORY: Mapping[str, tuple[str, ...]] = {
    "metal_active_gb": ("memory.active_memory_gb", "metal.active_memory_gb"),
    "metal_peak_gb": ("memory.peak_memory_gb", "metal.peak_memory_gb"),
    "metal_cache_gb": ("memory.cache_memory_gb", "metal.cache_memory_gb"),
}
_NOT_OFFERED = (404, 405, 501)


class ServerUnusable(VllmMlxError):
    """The server cannot be reached or refuses what every benchmark needs."""


class Server:
    """One server under test."""

    def __init__(self, http: HttpClient, *, url: str) -> None:
        self._http = http
        self.url = url
        self._offers_reset = True

    async def models(self) -> list[str]:
        """Ids of its models. Raises ServerUnusable if it cannot be asked."""
        answer = await self._must("GET", "/v1/models")
        if answer.status in _NOT_OFFERED:
            return []
        if answer.status != 200:
            raise ServerUnusable(f"{self.url}: GET /v1/models answered {answer.status}: {error_text(answer.body)}")
        found = _look_up(_object(answer.body), "data")
        return [card["id"] for card in found or () if isinstance(card, dict) and isinstance(card.get("id"), str)]

    async def choose_model(self, wanted: str | None) -> str:
        """The wanted model, else the first that the server lists.

        Raises:
            ServerUnusable: it cannot be reached, or lists none and none is wanted.
        """
        listed = await self.models()
        if wanted is None and not listed:
            raise ServerUnusable(f"{self.url} lists no model; name one with --model")
        return wanted or listed[0]

    async def facts(self) -> Facts:
        """What it tells about hardware and engine."""
        told = {"health": await self._json("/health"), "status": await self._json("/v1/status")}
        found = {name: _first(told, paths) for name, paths in _SOURCES.items()}
        return {name: value for name, value in found.items() if value is not None}

    async def memory(self) -> Facts:
        """Its device memory at this moment, in GB."""
        status = await self._json("/v1/status")
        found = {name: _first(status, paths) for name, paths in _MEMORY.items()}
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    async def counters(self) -> metrics.Counters:
        """Its Prometheus counters; empty if it has none."""
        answer = await self._try("GET", "/metrics")
        return metrics.parse(answer.body.decode(errors="replace")) if answer and answer.status == 200 else {}

    async def reset_cache(self) -> str:
        """Empty its caches if it offers that: 'cleared', 'not offered', or why not."""
        if not self._offers_reset:
            return "not offered"
        answer = await self._try("DELETE", "/v1/cache")
        if answer is None:
            return "failed: no answer"
        if 200 <= answer.status < 300:
            return "cleared"
        if answer.status in _NOT_OFFERED:
            self._offers_reset = False
            return "not offered"
        return f"failed: {answer.status} {error_text(answer.body)}"

    async def _json(self, path: str) -> Any:
        """A JSON object, also from an answer like 503 'not ready'; {} if there is none."""
        answer = await self._try("GET", path)
        return _object(answer.body) if answer else {}

    async def _try(self, method: str, path: str) -> Answer | None:
        try:
            return await self._http.request(method, path)
        except (ConnectionFailed, TimedOut, BrokenOff):
            return None

    async def _must(self, method: str, path: str) -> Answer:
        try:
            return await self._http.request(method, path)
        except (ConnectionFailed, TimedOut, BrokenOff) as error:
            raise ServerUnusable(f"cannot reach {self.url}: {error}") from None


def _object(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return {}


def _first(value: Any, paths: tuple[str, ...]) -> Any:
    """What stands at the first path that leads to a plain value."""
    for path in paths:
        found = _look_up(value, path)
        if isinstance(found, str | int | float | bool) and found != "":
            return found
    return None


def _look_up(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
