"""/v1/conversations: items that responses go on from and add to."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.limits import read_body
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.pages import After, Limit, Order, page
from vllm_mlx.api.response_store import Item
from vllm_mlx.api.responses.earlier import CONVERSATION_ITEMS, conversation_of, resolved
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.decode import Body, decode
from vllm_mlx.api.wire.responses.answers import ConversationAnswer, DeletedConversation, ItemList
from vllm_mlx.api.wire.responses.conversations import ConversationBody, ConversationUpdate, ItemsBody
from vllm_mlx.api.wire.responses.items import InputItem
from vllm_mlx.api.wire.responses.transcript import stored_items
from vllm_mlx.core.errors import NotFound

PATH = "/v1/conversations/{conversation_id}"


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Responses"])
    desk = _Desk(context)
    _add_conversations(routes, desk)
    _add_items(routes, desk)
    return routes


class _Desk:
    """What the endpoints share: reading bodies, and finding a tenant's conversation."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.store = context.responses

    def tenant(self, request: Request) -> bytes:
        return tenant_of(request, self._context.config)

    async def body(self, request: Request, model: type[Body]) -> Body:
        return decode(await read_body(request, max_mb=self._context.config.max_body_mb), model)

    async def found(self, request: Request, conversation_id: str) -> dict[str, Any]:
        return (await conversation_of(self.store, conversation_id, tenant=self.tenant(request))).body

    async def items(self, conversation_id: str) -> list[Item]:
        return await asyncio.to_thread(self.store.items, conversation_id, CONVERSATION_ITEMS)

    async def to_store(self, request: Request, items: list[InputItem]) -> list[Item]:
        """Items with ids, references replaced. Raises NotFound for one that is not stored."""
        whole = await resolved(self.store, items, tenant=self.tenant(request))
        return stored_items(whole, key=uuid.uuid4().hex)

    async def put(self, request: Request, answer: ConversationAnswer, items: list[Item] | None = None) -> None:
        sides = None if items is None else {CONVERSATION_ITEMS: items}
        raw, tenant = msgspec.json.encode(answer), self.tenant(request)
        await asyncio.to_thread(self.store.put, answer.id, raw, tenant=tenant, items=sides)


def _add_conversations(routes: APIRouter, desk: _Desk) -> None:
    @routes.post(
        "/v1/conversations",
        openapi_extra=json_body(ConversationBody),
        responses=json_answers(ConversationAnswer),
        response_class=Response,
    )
    async def create_conversation(request: Request) -> Response:
        """Keep a conversation."""
        body = await desk.body(request, ConversationBody)
        answer = ConversationAnswer(f"conv_{uuid.uuid4().hex}", int(time.time()), body.metadata or {})
        await desk.put(request, answer, await desk.to_store(request, body.items or []))
        return _json(answer)

    @routes.get(PATH, responses=json_answers(ConversationAnswer), response_class=Response)
    async def retrieve_conversation(request: Request, conversation_id: str) -> Response:
        """A conversation, without its items."""
        return _json(await desk.found(request, conversation_id))

    @routes.post(
        PATH,
        openapi_extra=json_body(ConversationUpdate),
        responses=json_answers(ConversationAnswer),
        response_class=Response,
    )
    async def update_conversation(request: Request, conversation_id: str) -> Response:
        """Change what is noted of a conversation."""
        body = await desk.body(request, ConversationUpdate)
        found = await desk.found(request, conversation_id)
        answer = ConversationAnswer(conversation_id, found["created_at"], body.metadata or {})
        await desk.put(request, answer)
        return _json(answer)

    @routes.delete(PATH, responses=json_answers(DeletedConversation), response_class=Response)
    async def delete_conversation(request: Request, conversation_id: str) -> Response:
        """Forget a conversation and its items."""
        await desk.found(request, conversation_id)
        await asyncio.to_thread(desk.store.delete, conversation_id, tenant=desk.tenant(request))
        return _json(DeletedConversation(conversation_id))


def _add_items(routes: APIRouter, desk: _Desk) -> None:
    @routes.get(PATH + "/items", responses=json_answers(ItemList), response_class=Response)
    async def list_conversation_items(
        request: Request, conversation_id: str, after: After = None, limit: Limit = 20, order: Order = "desc"
    ) -> Response:
        """The items of a conversation, newest first unless asked otherwise."""
        await desk.found(request, conversation_id)
        return _json(page(await desk.items(conversation_id), after=after, limit=limit, order=order))

    @routes.post(
        PATH + "/items",
        openapi_extra=json_body(ItemsBody),
        responses=json_answers(ItemList),
        response_class=Response,
    )
    async def add_conversation_items(request: Request, conversation_id: str) -> Response:
        """Add items to a conversation."""
        body = await desk.body(request, ItemsBody)
        await desk.found(request, conversation_id)
        added = await desk.to_store(request, body.items)
        await asyncio.to_thread(desk.store.append, conversation_id, CONVERSATION_ITEMS, added)
        return _json(page(added, after=None, limit=len(added), order="asc"))

    @routes.get(PATH + "/items/{item_id}", response_class=Response)
    async def retrieve_conversation_item(request: Request, conversation_id: str, item_id: str) -> Response:
        """One item of a conversation."""
        await desk.found(request, conversation_id)
        for item in await desk.items(conversation_id):
            if item["id"] == item_id:
                return _json(item)
        raise _no_item(item_id)

    @routes.delete(PATH + "/items/{item_id}", responses=json_answers(ConversationAnswer), response_class=Response)
    async def delete_conversation_item(request: Request, conversation_id: str, item_id: str) -> Response:
        """Forget one item of a conversation."""
        found = await desk.found(request, conversation_id)
        if not await asyncio.to_thread(desk.store.delete_item, conversation_id, item_id):
            raise _no_item(item_id)
        return _json(found)


def _no_item(item_id: str) -> NotFound:
    return NotFound(f"The conversation has no item '{item_id}'.", param="item_id")


def _json(answer: object) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
