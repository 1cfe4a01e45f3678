"""GET /v1/status: one look at everything, for people and dashboards."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from vllm_mlx.api.context import Context
from vllm_mlx.core.messages import EngineState, EngineStatus
from vllm_mlx.core.step import MemoryUse

_GIB = 1024**3


def router(context: Context) -> APIRouter:
    """The endpoint over one server."""
    routes = APIRouter(tags=["Server"])

    @routes.get("/v1/status", response_class=Response)
    async def status() -> Response:
        """Model, load and totals since the server started."""
        return JSONResponse(_report(context))

    return routes


def _report(context: Context) -> dict[str, Any]:
    status, metrics = context.engine.status(), context.metrics
    stats = status.stats
    return {
        "status": "running" if status.state is EngineState.READY else status.state.value,
        "model": context.config.model_name,
        "uptime_s": round(time.time() - context.started_at),
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "waiting": {
            "for_their_turn": stats.num_waiting - stats.num_loading,
            "loading_from_disk": stats.num_loading,
        },
        "pages_used": stats.pages_used,
        "pages_free": stats.pages_free,
        "pages_kept": stats.pages_kept,
        "pages_pinned": stats.pages_pinned,
        "checkpoints": stats.num_checkpoints,
        "preemptions": stats.num_preemptions,
        "steps_executed": stats.num_steps,
        "engine_restarts": status.num_restarts,
        "requests_in_flight": context.lifecycle.num_open,
        "total_prompt_tokens": metrics.total("prompt_tokens"),
        "total_completion_tokens": metrics.total("generation_tokens"),
        "total_cached_tokens": metrics.total("cached_prompt_tokens"),
        "memory": _memory(stats.memory),
        "kernels": _kernels(status),
        "embedding": None,
    }


def _kernels(status: EngineStatus) -> list[dict[str, Any]]:
    """How the GPU's kernels fared; none on a CPU."""
    return [
        {"name": kernel.name, "live": kernel.problem is None, "problem": kernel.problem, "error": kernel.error}
        for kernel in (status.info.kernels if status.info else ())
    ]


def _memory(memory: MemoryUse) -> dict[str, float]:
    return {
        "active_memory_gb": round(memory.active / _GIB, 3),
        "peak_memory_gb": round(memory.peak / _GIB, 3),
        "cache_memory_gb": round(memory.cache / _GIB, 3),
        "weights_gb": round(memory.weights / _GIB, 3),
        "pages_gb": round(memory.pages / _GIB, 3),
        "rows_gb": round(memory.rows / _GIB, 3),
        "checkpoints_gb": round(memory.checkpoints / _GIB, 3),
        "staging_gb": round(memory.staging / _GIB, 3),
    }
