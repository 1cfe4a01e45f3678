"""What a response goes on from: earlier responses, a conversation, and items that are named only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from vllm_mlx.api.response_store import Item, ResponseStore, StoredObject
from vllm_mlx.api.wire.responses.body import PromptFields
from vllm_mlx.api.wire.responses.items import ItemReference, ResolvedItem
from vllm_mlx.api.wire.responses.transcript import read_items
from vllm_mlx.core.errors import InvalidRequest, NotFound

CONVERSATION_ITEMS = "items"
"""The side of a conversation that holds its items; responses have 'input' and 'output'."""


async def earlier_items(store: ResponseStore, body: PromptFields, *, tenant: bytes) -> list[ResolvedItem]:
    """The items before the input, oldest first. Raises InvalidRequest or NotFound if they are not all there."""
    if body.previous_response_id is not None:
        return read_items(await asyncio.to_thread(_chain, store, body.previous_response_id, tenant))
    if body.conversation_id is not None:
        await conversation_of(store, body.conversation_id, tenant=tenant)
        return read_items(await asyncio.to_thread(store.items, body.conversation_id, CONVERSATION_ITEMS))
    return []


async def resolved(
    store: ResponseStore, items: Sequence[ResolvedItem | ItemReference], *, tenant: bytes
) -> list[ResolvedItem]:
    """The items with references replaced. Raises NotFound for an item that is not stored."""
    found: list[ResolvedItem] = []
    for index, item in enumerate(items):
        if not isinstance(item, ItemReference):
            found.append(item)
            continue
        stored = await asyncio.to_thread(store.item, item.id, tenant=tenant)
        if stored is None:
            message = f"Item '{item.id}' is not stored. Items are kept only of responses that have store: true."
            raise NotFound(message, param=f"input.{index}.id")
        found += read_items([stored])
    return found


async def conversation_of(store: ResponseStore, conversation_id: str, *, tenant: bytes) -> StoredObject:
    """A conversation. Raises NotFound."""
    return await _object(store, conversation_id, "conversation", tenant)


async def response_of(store: ResponseStore, response_id: str, *, tenant: bytes) -> StoredObject:
    """A stored response. Raises NotFound."""
    return await _object(store, response_id, "response", tenant)


async def _object(store: ResponseStore, object_id: str, kind: str, tenant: bytes) -> StoredObject:
    found = await asyncio.to_thread(store.get, object_id, tenant=tenant)
    if found is None or found.body["object"] != kind:
        raise NotFound(f"{kind.capitalize()} with id '{object_id}' not found.", code=f"{kind}_not_found")
    return found


def _chain(store: ResponseStore, response_id: str, tenant: bytes) -> list[Item]:
    """Input and output of a response and of all that came before it. Instructions are not carried over."""
    parts: list[list[Item]] = []
    at: str | None = response_id
    while at is not None:
        found = store.get(at, tenant=tenant)
        _check_previous(found.body if found else None, at)
        assert found is not None
        parts.append(store.items(at, "input", "output"))
        at = found.body["previous_response_id"]
    return [item for part in reversed(parts) for item in part]


def _check_previous(body: dict[str, Any] | None, response_id: str) -> None:
    code, param = "previous_response_not_found", "previous_response_id"
    if body is None or body["object"] != "response":
        raise InvalidRequest(f"Previous response with id '{response_id}' not found.", param=param, code=code)
    if body["status"] in ("queued", "in_progress"):
        raise InvalidRequest(f"Previous response '{response_id}' is not finished: wait for it.", param=param)
    if body["conversation"] is not None:
        name = body["conversation"]["id"]
        raise InvalidRequest(
            f"Response '{response_id}' belongs to conversation '{name}': send conversation instead.", param=param
        )
