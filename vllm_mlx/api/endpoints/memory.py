"""GET /v1/memory: where every byte on the device is."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.openapi import json_answers
from vllm_mlx.api.wire.cache import BoundsAnswer, LedgerAnswer, MemoryAnswer
from vllm_mlx.core.messages import EngineStatus


def router(context: Context) -> APIRouter:
    """The endpoint over one server."""
    routes = APIRouter(tags=["Server"])

    @routes.get("/v1/memory", responses=json_answers(MemoryAnswer), response_class=Response)
    async def memory() -> Response:
        """Bytes by what they are for, as the engine last reported, and the bounds in force."""
        return Response(msgspec.json.encode(_report(context)), media_type="application/json")

    return routes


def _report(context: Context) -> MemoryAnswer:
    status, config = context.engine.status(), context.config
    use, info = status.stats.memory, status.info
    return MemoryAnswer(
        ledger=_ledger(status),
        active_bytes=use.active,
        peak_bytes=use.peak,
        bounds=BoundsAnswer(
            gpu_memory_utilization=config.gpu_memory_utilization,
            cache_memory_mb=config.cache_memory_mb,
            cache_memory_percent=config.cache_memory_percent,
            page_bytes=info.num_pages * info.cache.page_bytes if info else 0,
        ),
    )


def _ledger(status: EngineStatus) -> LedgerAnswer:
    """Where the pages' memory went follows from their numbers."""
    use, stats = status.stats.memory, status.stats
    page_bytes = status.info.cache.page_bytes if status.info else 0
    pages_used = min(use.pages, stats.pages_used * page_bytes)
    pages_kept = min(use.pages - pages_used, stats.pages_kept * page_bytes)
    named = use.weights + use.pages + use.rows + use.checkpoints
    return LedgerAnswer(
        weights=use.weights,
        pages_used=pages_used,
        pages_kept=pages_kept,
        pages_free=use.pages - pages_used - pages_kept,
        checkpoints=use.checkpoints,
        rows=use.rows,
        vision=0,
        staging=use.staging,
        other=max(0, use.active - named),
        allocator_cache=use.cache,
    )
