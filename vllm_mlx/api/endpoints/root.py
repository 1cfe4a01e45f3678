"""GET / and /version: what this is."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from vllm_mlx import __version__
from vllm_mlx.api.context import Context

_LINKS = ("/docs", "/v1/models", "/health", "/metrics")


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Server"])

    @routes.head("/", include_in_schema=False)
    @routes.get("/", response_class=Response)
    async def root() -> Response:
        """Name and where to go from here."""
        answer = {"name": "vllm-mlx", "version": __version__, "model": context.config.model_name, "links": _LINKS}
        return JSONResponse(answer)

    @routes.get("/version", response_class=Response)
    async def version() -> Response:
        """Version of the server."""
        return JSONResponse({"version": __version__})

    return routes
