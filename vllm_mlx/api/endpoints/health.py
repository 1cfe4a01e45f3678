"""GET /health, /livez, /readyz: for load balancers, orchestrators and people."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from vllm_mlx import __version__
from vllm_mlx.api.context import Context
from vllm_mlx.core.messages import EngineState, EngineStatus

_WORDS = {
    EngineState.STARTING: "loading",
    EngineState.READY: "healthy",
    EngineState.RESTARTING: "restarting",
    EngineState.FAILED: "unhealthy",
    EngineState.STOPPED: "stopped",
}
_HOPELESS = (EngineState.FAILED, EngineState.STOPPED)


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Server"])

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", response_class=Response)
    async def health() -> Response:
        """200 if requests are answered, 503 if not, and what the engine is doing."""
        status = context.engine.status()
        return JSONResponse(_report(context, status), 200 if status.state is EngineState.READY else 503)

    @routes.head("/livez", include_in_schema=False)
    @routes.get("/livez", response_class=Response)
    async def livez() -> Response:
        """503 if only a restart of the whole server can help."""
        return _short(context.engine.status().state not in _HOPELESS, "alive")

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz", response_class=Response)
    async def readyz() -> Response:
        """200 if new requests should be sent here."""
        lifecycle = context.lifecycle
        is_ready = (
            context.engine.status().state is EngineState.READY and lifecycle.is_warm and not lifecycle.is_draining
        )
        return _short(is_ready, "ready")

    return routes


def _short(holds: bool, word: str) -> Response:
    return JSONResponse({"status": word if holds else f"not {word}"}, 200 if holds else 503)


def _report(context: Context, status: EngineStatus) -> dict[str, Any]:
    name = context.config.model_name
    is_loaded = status.state is EngineState.READY
    return {
        "status": _WORDS[status.state],
        "model_loaded": is_loaded,
        "model_name": name,
        "available_models": [name],
        "model_type": "llm",
        "engine_type": "batched",
        "engine": _engine(status),
        "draining": context.lifecycle.is_draining,
        "version": __version__,
        "uptime_s": round(time.time() - context.started_at),
    }


def _engine(status: EngineStatus) -> dict[str, Any]:
    info = status.info
    return {
        "state": status.state.value,
        "reason": status.reason,
        "restarts": status.num_restarts,
        "backend": info.backend if info else None,
        "device": info.device if info else None,
        "dtype": info.dtype if info else None,
        "max_model_len": info.max_model_len if info else None,
    }
