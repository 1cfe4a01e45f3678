"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from vllm_mlx.api.context import Context


def router(context: Context) -> APIRouter:
    """The endpoint over one server."""
    routes = APIRouter(tags=["Server"])

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters, gauges and histograms in Prometheus's text format."""
        return Response(generate_latest(context.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return routes
