"""/v1/batches: requests in files, carried out while nobody else waits."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.batches import POSSIBLE, Batches, batches_of
from vllm_mlx.api.context import Context
from vllm_mlx.api.limits import read_body
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.batches import BatchAnswer, BatchBody, BatchList
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.core.errors import InvalidRequest

MAX_PAGE = 100


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Batches"])

    @routes.post(
        "/v1/batches",
        openapi_extra=json_body(BatchBody),
        responses=json_answers(BatchAnswer),
        response_class=Response,
    )
    async def create_batch(request: Request) -> Response:
        """Carry out the requests of an uploaded file."""
        context.lifecycle.admit()
        body = decode(await read_body(request, max_mb=context.config.max_body_mb), BatchBody)
        batches = batches_of(request)
        _check_endpoint(body.endpoint, batches)
        tenant = tenant_of(request, context.config).hex()
        batch = await batches.desk.call(
            lambda store: store.create(body, model=context.config.model_name, tenant=tenant)
        )
        batches.runner.begin()
        return _json(batch)

    @routes.get("/v1/batches", responses=json_answers(BatchList), response_class=Response)
    async def list_batches(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20
    ) -> Response:
        """Batches, latest first."""
        found, has_more = await batches_of(request).desk.call(lambda store: store.page(after=after, limit=limit))
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return _json(BatchList(found, has_more, first, last))

    @routes.get("/v1/batches/{batch_id}", responses=json_answers(BatchAnswer), response_class=Response)
    async def retrieve_batch(request: Request, batch_id: str) -> Response:
        """Where a batch stands."""
        return _json(await batches_of(request).desk.call(lambda store: store.get(batch_id)))

    @routes.post("/v1/batches/{batch_id}/cancel", responses=json_answers(BatchAnswer), response_class=Response)
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        """Carry out no more of it; what is done is in its files."""
        return _json(await batches_of(request).runner.cancel(batch_id))

    return routes


def _check_endpoint(endpoint: str, batches: Batches) -> None:
    """Raise InvalidRequest unless lines can be sent there."""
    if endpoint in batches.endpoints:
        return
    shown = ", ".join(batches.endpoints)
    problem = "is not offered by this server" if endpoint in POSSIBLE else "cannot be put into batches"
    raise InvalidRequest(f"The endpoint '{endpoint}' {problem}; use one of: {shown}.", param="endpoint")


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
