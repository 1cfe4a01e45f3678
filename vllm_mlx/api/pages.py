"""Lists that are read page by page, as OpenAI's clients do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Query

from vllm_mlx.api.wire.responses.answers import ItemList
from vllm_mlx.core.errors import InvalidRequest

After = Annotated[str | None, Query(description="Begin behind the item with this id.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items of the page.")]
Order = Annotated[Literal["asc", "desc"], Query(description="Oldest or newest first.")]


def page(items: Sequence[dict[str, Any]], *, after: str | None, limit: int, order: str) -> ItemList:
    """One page of items, given oldest first. Raises InvalidRequest if `after` is none of them."""
    ordered = list(items) if order == "asc" else list(reversed(items))
    start = 0
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise InvalidRequest(f"after: there is no item '{after}' in this list.", param="after")
        start = ids.index(after) + 1
    data = ordered[start : start + limit]
    first_id, last_id = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return ItemList(data, first_id, last_id, has_more=start + limit < len(ordered))
