"""/v1/messages/batches: Anthropic's batches, on the same store and runner as OpenAI's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from vllm_mlx.api.batches import batches_of
from vllm_mlx.api.batches.store import Store
from vllm_mlx.api.context import Context
from vllm_mlx.api.limits import read_body
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.anthropic.answers import ErrorAnswer
from vllm_mlx.api.wire.anthropic.batches import (
    ID_PREFIX,
    PATH,
    DeletedBatch,
    MessageBatchAnswer,
    MessageBatchBody,
    MessageBatchList,
    batch_answer,
    input_lines,
    result_lines,
)
from vllm_mlx.api.wire.batches import BatchAnswer, BatchBody, BatchStatus
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.files import BATCH, DEFAULT_EXPIRY_S
from vllm_mlx.core.errors import InvalidRequest, NotFound

_SPOOLED_BYTES = 1 << 22


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Messages"], prefix="/v1/messages/batches")
    _add_making(routes, context)
    _add_looking(routes)
    return routes


def _add_making(routes: APIRouter, context: Context) -> None:
    @routes.post(
        "",
        openapi_extra=json_body(MessageBatchBody),
        responses=json_answers(MessageBatchAnswer, error=ErrorAnswer),
        response_class=Response,
    )
    async def create_message_batch(request: Request) -> Response:
        """Make messages while nobody else waits."""
        context.lifecycle.admit()
        body = decode(await read_body(request, max_mb=context.config.max_body_mb), MessageBatchBody)
        batches = batches_of(request)
        tenant = tenant_of(request, context.config).hex()
        batch = await batches.desk.call(partial(_create, body=body, model=context.config.model_name, tenant=tenant))
        batches.runner.begin()
        return _json(_answer(request, batch, 0))

    @routes.post(
        "/{batch_id}/cancel", responses=json_answers(MessageBatchAnswer, error=ErrorAnswer), response_class=Response
    )
    async def cancel_message_batch(request: Request, batch_id: str) -> Response:
        """Begin no more of its requests; one that has ended is answered as it is."""
        batches = batches_of(request)
        batch = await batches.desk.call(partial(_get, batch_id=batch_id))
        if not batch.is_ended:
            await batches.runner.cancel(batch_id)
        return _json(_answer(request, *await batches.desk.call(partial(_look, batch_id=batch_id))))

    @routes.delete("/{batch_id}", responses=json_answers(DeletedBatch, error=ErrorAnswer), response_class=Response)
    async def delete_message_batch(request: Request, batch_id: str) -> Response:
        """Forget a batch that has ended, with its results."""
        await batches_of(request).desk.call(partial(_delete, batch_id=batch_id))
        return _json(DeletedBatch(batch_id))


def _add_looking(routes: APIRouter) -> None:
    @routes.get("", responses=json_answers(MessageBatchList, error=ErrorAnswer), response_class=Response)
    async def list_message_batches(
        request: Request,
        after_id: str | None = None,
        before_id: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    ) -> Response:
        """Batches, latest first."""
        if after_id is not None and before_id is not None:
            raise InvalidRequest("after_id and before_id exclude each other; send one of them.", param="before_id")
        look = partial(_page, after=after_id, before=before_id, limit=limit)
        found, has_more = await batches_of(request).desk.call(look)
        data = [_answer(request, *one) for one in found]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return _json(MessageBatchList(data, has_more, first, last))

    @routes.get("/{batch_id}", responses=json_answers(MessageBatchAnswer, error=ErrorAnswer), response_class=Response)
    async def retrieve_message_batch(request: Request, batch_id: str) -> Response:
        """Where a batch stands."""
        return _json(_answer(request, *await batches_of(request).desk.call(partial(_look, batch_id=batch_id))))

    @routes.get("/{batch_id}/results", response_class=Response)
    async def message_batch_results(request: Request, batch_id: str) -> Response:
        """What became of each request, one JSON object a line, in no particular order."""
        paths = await batches_of(request).desk.call(partial(_result_paths, batch_id=batch_id))
        return StreamingResponse(result_lines(_read(paths)), media_type="application/x-jsonl")


# ---- on the store's thread ----


def _create(store: Store, *, body: MessageBatchBody, model: str, tenant: str) -> BatchAnswer:
    with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as spooled:
        for line in input_lines(body):
            spooled.write(line)
        spooled.seek(0)
        file = store.files.write(spooled, filename="requests.jsonl", purpose=BATCH, expires_s=DEFAULT_EXPIRY_S)
    asked = BatchBody(input_file_id=file.id, endpoint=PATH, completion_window="24h")
    return store.create(asked, model=model, tenant=tenant, id_prefix=ID_PREFIX, total=len(body.requests))


def _get(store: Store, *, batch_id: str) -> BatchAnswer:
    if not batch_id.startswith(ID_PREFIX):
        raise NotFound(f"There is no batch '{batch_id}'.")
    return store.get(batch_id)


def _look(store: Store, *, batch_id: str) -> tuple[BatchAnswer, int]:
    batch = _get(store, batch_id=batch_id)
    return batch, _num_left(store, batch)


def _page(
    store: Store, *, after: str | None, before: str | None, limit: int
) -> tuple[list[tuple[BatchAnswer, int]], bool]:
    found, has_more = store.page(after=after, before=before, limit=limit, id_prefix=ID_PREFIX)
    return [(batch, _num_left(store, batch)) for batch in found], has_more


def _num_left(store: Store, batch: BatchAnswer) -> int:
    """Requests that were never begun; only the error file of a batch that ended early tells them from failed ones."""
    if batch.status not in (BatchStatus.CANCELLED, BatchStatus.EXPIRED) or batch.error_file_id is None:
        return 0
    with store.files.open(batch.error_file_id) as lines:
        return sum(b'"result":{"type":"errored"' not in line for line in result_lines(lines))


def _delete(store: Store, *, batch_id: str) -> None:
    batch = _get(store, batch_id=batch_id)
    if not batch.is_ended:
        raise InvalidRequest("A batch that has not ended cannot be deleted; cancel it first.", param="batch_id")
    store.delete(batch)


def _result_paths(store: Store, *, batch_id: str) -> list[Path]:
    batch = _get(store, batch_id=batch_id)
    if not batch.is_ended:
        raise InvalidRequest(f"The batch '{batch_id}' has no results yet; ask again when it has ended.")
    return [store.files.path(name) for name in (batch.output_file_id, batch.error_file_id) if name is not None]


def _read(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as lines:
            yield from lines


def _answer(request: Request, batch: BatchAnswer, num_left: int) -> MessageBatchAnswer:
    url = f"{request.base_url}v1/messages/batches/{batch.id}/results"
    return batch_answer(batch, num_left=num_left, results_url=url)


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
