"""/v1/responses: make, look up, follow, cancel and delete responses."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.generate import admitted
from vllm_mlx.api.limits import read_body
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.pages import After, Limit, Order, page
from vllm_mlx.api.responses.background import Background
from vllm_mlx.api.responses.earlier import response_of
from vllm_mlx.api.responses.follow import check_include, followed
from vllm_mlx.api.responses.start import count, respond
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.responses.answers import (
    DeletedResponse,
    InputTokensAnswer,
    ItemList,
    ResponseAnswer,
)
from vllm_mlx.api.wire.responses.body import InputTokensBody, ResponsesBody
from vllm_mlx.core.errors import InvalidRequest

Include = Annotated[list[str] | None, Query(description="Only `reasoning.encrypted_content`.")]
BracketInclude = Annotated[list[str] | None, Query(alias="include[]", description="The same, as OpenAI's SDK says it.")]

Obfuscation = Annotated[
    bool | None, Query(alias="include_obfuscation", description="Accepted; this server never pads its events.")
]


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Responses"])
    background = Background(context.lifecycle, context.responses)
    _add_making(routes, context, background)
    _add_looking(routes, context, background)
    _add_ending(routes, context, background)
    return routes


def _add_making(routes: APIRouter, context: Context, background: Background) -> None:
    @routes.post(
        "/v1/responses",
        openapi_extra=json_body(ResponsesBody),
        responses=json_answers(ResponseAnswer, is_streamed=True),
        response_class=Response,
    )
    async def create_response(request: Request) -> Response:
        """Make a response."""
        body, record = await admitted(request, ResponsesBody, context)
        return await respond(request, body, record, context=context, background=background)

    @routes.post(
        "/v1/responses/input_tokens",
        openapi_extra=json_body(InputTokensBody),
        responses=json_answers(InputTokensAnswer),
        response_class=Response,
    )
    async def count_input_tokens(request: Request) -> Response:
        """Count the tokens of a prompt; nothing is generated."""
        body = decode(await read_body(request, max_mb=context.config.max_body_mb), InputTokensBody)
        context.check_model(body.model)
        return _json(InputTokensAnswer(await count(body, context, tenant=tenant_of(request, context.config))))


def _add_looking(routes: APIRouter, context: Context, background: Background) -> None:
    @routes.get(
        "/v1/responses/{response_id}",
        responses=json_answers(ResponseAnswer, is_streamed=True),
        response_class=Response,
    )
    async def retrieve_response(
        request: Request,
        response_id: str,
        include: Include = None,
        include_brackets: BracketInclude = None,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=0)] = None,
        _obfuscation: Obfuscation = None,
    ) -> Response:
        """A stored response; one that ran in the background can also be streamed, from any of its events on."""
        tenant = tenant_of(request, context.config)
        wanted = check_include([*(include or ()), *(include_brackets or ())])
        if starting_after is not None and not stream:
            raise InvalidRequest("starting_after needs stream=true.", param="starting_after")
        live = background.get(response_id, tenant=tenant)
        if stream:
            after = -1 if starting_after is None else starting_after
            return await followed(response_id, live, context, tenant=tenant, after=after)
        if live is not None:
            return _json(live.answer)
        stored = await response_of(context.responses, response_id, tenant=tenant)
        return _json(wanted(stored.body, context.responses))

    @routes.get("/v1/responses/{response_id}/input_items", responses=json_answers(ItemList), response_class=Response)
    async def list_input_items(
        request: Request,
        response_id: str,
        after: After = None,
        limit: Limit = 20,
        order: Order = "desc",
        include: Include = None,
        include_brackets: BracketInclude = None,
    ) -> Response:
        """The items of a response's own input, newest first unless asked otherwise."""
        check_include([*(include or ()), *(include_brackets or ())])
        await response_of(context.responses, response_id, tenant=tenant_of(request, context.config))
        items = await asyncio.to_thread(context.responses.items, response_id, "input")
        return _json(page(items, after=after, limit=limit, order=order))


def _add_ending(routes: APIRouter, context: Context, background: Background) -> None:
    @routes.post("/v1/responses/{response_id}/cancel", responses=json_answers(ResponseAnswer), response_class=Response)
    async def cancel_response(request: Request, response_id: str) -> Response:
        """End a response that runs in the background; one that has ended is answered as it is."""
        tenant = tenant_of(request, context.config)
        live = background.get(response_id, tenant=tenant)
        if live is not None:
            return _json(await live.cancel())
        stored = await response_of(context.responses, response_id, tenant=tenant)
        if not stored.body["background"]:
            raise InvalidRequest("Only responses made with background: true can be cancelled.", param="response_id")
        return _json(stored.body)

    @routes.delete("/v1/responses/{response_id}", responses=json_answers(DeletedResponse), response_class=Response)
    async def delete_response(request: Request, response_id: str) -> Response:
        """Forget a response; one that runs is cancelled first."""
        tenant = tenant_of(request, context.config)
        live = background.get(response_id, tenant=tenant)
        if live is not None:
            await live.cancel()
        await response_of(context.responses, response_id, tenant=tenant)
        await asyncio.to_thread(context.responses.delete, response_id, tenant=tenant)
        return _json(DeletedResponse(response_id))


def _json(answer: object) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
