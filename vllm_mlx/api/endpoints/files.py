"""/v1/files: upload, list, read and delete the inputs and results of batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from vllm_mlx.api.batches import batches_of
from vllm_mlx.api.context import Context
from vllm_mlx.api.openapi import json_answers
from vllm_mlx.api.upload import uploaded
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.files import (
    DEFAULT_EXPIRY_S,
    OTHER_PURPOSES,
    FileAnswer,
    FileDeleted,
    FileList,
    UploadFields,
)
from vllm_mlx.core.errors import InvalidRequest

MAX_PAGE = 10_000
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer"},
    },
}


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Files"])

    @routes.post(
        "/v1/files",
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
        responses=json_answers(FileAnswer),
        response_class=Response,
    )
    async def upload_file(request: Request) -> Response:
        """Upload the requests of a batch: one JSON object a line."""
        async with uploaded(request, max_mb=context.config.files_max_mb) as (file, raw):
            fields = _upload_fields(raw)
            expires_s = fields.expires_after.seconds if fields.expires_after else DEFAULT_EXPIRY_S
            name, source = file.filename or "upload.jsonl", file.file
            made = await batches_of(request).desk.call(
                lambda store: store.files.write(source, filename=name, purpose=fields.purpose, expires_s=expires_s)
            )
        return _json(made)

    @routes.get("/v1/files", responses=json_answers(FileList), response_class=Response)
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Files, latest first unless `order` is `asc`."""
        found, has_more = await batches_of(request).desk.call(
            lambda store: store.files.page(purpose=purpose, after=after, limit=limit, is_ascending=order == "asc")
        )
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return _json(FileList(found, has_more, first, last))

    @routes.get("/v1/files/{file_id}", responses=json_answers(FileAnswer), response_class=Response)
    async def retrieve_file(request: Request, file_id: str) -> Response:
        """What is known of a file."""
        return _json(await batches_of(request).desk.call(lambda store: store.files.get(file_id)))

    @routes.get("/v1/files/{file_id}/content", response_class=Response)
    async def read_file(request: Request, file_id: str) -> Response:
        """The contents of a file."""
        path = await batches_of(request).desk.call(lambda store: store.files.path(file_id))
        return FileResponse(path, media_type="application/jsonl")

    @routes.delete("/v1/files/{file_id}", responses=json_answers(FileDeleted), response_class=Response)
    async def delete_file(request: Request, file_id: str) -> Response:
        """Delete a file; not while an unfinished batch reads it."""
        await batches_of(request).desk.call(lambda store: store.files.delete(file_id))
        return _json(FileDeleted(file_id))

    return routes


def _upload_fields(raw: bytes) -> UploadFields:
    """Raises InvalidRequest; OpenAI's other purposes are told apart from mistakes."""
    purpose = msgspec.json.decode(raw).get("purpose")
    if purpose in OTHER_PURPOSES:
        message = f"The purpose '{purpose}' is not supported: this server takes files for batches only."
        raise InvalidRequest(message, param="purpose", code="unsupported_value")
    return decode(raw, UploadFields)


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
