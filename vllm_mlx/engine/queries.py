"""Questions to the present engine that callers wait for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from vllm_mlx.core.errors import EngineFailure
from vllm_mlx.core.messages import CacheForget, CacheForgotten, CacheLookedUp, CacheLookup, ToEngine

Query = CacheLookup | CacheForget
Answer = CacheLookedUp | CacheForgotten


class OpenQueries:
    """Matches answers to questions. Unlike a request, a question is not asked again when the engine ends: its answer
    would be about another cache. Used on the event loop only.
    """

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[Answer]] = {}

    def next_id(self) -> str:
        """A name that no other question of this client has."""
        return f"query-{next(self._numbers)}"

    async def ask(self, query: Query) -> Answer:
        """Send a question to the engine, which must be ready, and wait for its answer.

        Raises:
            EngineFailure: the engine ended before it answered.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[query.query_id] = future
        try:
            self._send(query)
            return await future
        finally:
            del self._waiting[query.query_id]

    def deliver(self, answer: Answer) -> None:
        """Hand an answer to its caller; one that nobody waits for any more is dropped."""
        future = self._waiting.get(answer.query_id)
        if future is not None and not future.done():
            future.set_result(answer)

    def fail_all(self, reason: str) -> None:
        """No answer will come."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineFailure(f"{reason} Ask again when the engine is ready.", status=503))
