"""Responses that go on without their clients, who come back to look, to follow the stream, or to cancel."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator
from typing import Any

from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.api.response_store import ResponseStore
from vllm_mlx.api.responses.run import Run, frames
from vllm_mlx.api.wire.responses.answers import ResponseAnswer
from vllm_mlx.core import log

_log = log.get_logger("api")
_END = b"\n\n"


class LiveRun:
    """A response that runs in the background. Every event of its stream is kept: its place is its number."""

    def __init__(self, run: Run, lifecycle: Lifecycle) -> None:
        self._run = run
        self._lifecycle = lifecycle
        self._frames: list[bytes] = []
        self._changed = asyncio.Event()
        self._is_done = False
        self.task = asyncio.create_task(self._work())

    @property
    def answer(self) -> ResponseAnswer:
        """The response so far."""
        return self._run.encoder.answer

    @property
    def tenant(self) -> bytes:
        """Whose it is."""
        return self._run.keeper.tenant

    async def cancel(self) -> ResponseAnswer:
        """End it, unless it has ended; the response as it is then."""
        await asyncio.sleep(0)  # a task that never began would not clean up
        if not self._is_done:  # what is being stored is not interrupted
            self.task.cancel()
        await asyncio.wait([self.task])
        return self.answer

    async def follow(self, *, after: int) -> AsyncGenerator[bytes, None]:
        """The stream from the event behind number `after` (-1: from the first) to its end."""
        place = after + 1
        while True:
            if place < len(self._frames):
                data = b"".join(self._frames[place:])
                place = len(self._frames)
                yield data
            elif self._is_done:
                return
            else:
                await self._changed.wait()

    async def _work(self) -> None:
        """Never raises: errors are events, and a cancelled run ends as cancelled."""
        with self._lifecycle.open_request():
            try:
                async for data in self._run.background():
                    self._add(data)
            except asyncio.CancelledError:
                if not self._run.encoder.is_ended:
                    self._add(frames(self._run.encoder.cancelling()))
            self._is_done = True  # from here on nothing interrupts it, see `cancel`
            self._wake()
            await self._run.events.aclose()
            try:
                await self._run.keeper.end(self.answer, b"".join(self._frames))
            except sqlite3.Error as error:
                _log.error("a background response could not be stored", exc_info=error)

    def _add(self, data: bytes) -> None:
        self._frames += split(data)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Background:
    """The live runs of a server. Used on its event loop only."""

    def __init__(self, lifecycle: Lifecycle, store: ResponseStore) -> None:
        """Responses of the store that a stopped server left unfinished are marked as failed."""
        self._lifecycle = lifecycle
        self._live: dict[str, LiveRun] = {}
        store.rewrite(_failed_if_open)

    def start(self, run: Run) -> LiveRun:
        """Store the response as it is, and let it run."""
        answer = run.encoder.answer
        run.keeper.begin(answer)
        live = self._live[answer.id] = LiveRun(run, self._lifecycle)
        live.task.add_done_callback(lambda _: self._live.pop(answer.id))
        return live

    def get(self, response_id: str, *, tenant: bytes) -> LiveRun | None:
        """A run that has not ended, of this tenant."""
        live = self._live.get(response_id)
        return live if live is not None and live.tenant == tenant else None


def split(data: bytes) -> list[bytes]:
    """Frames that were joined; JSON has no line breaks, so nothing else in them is empty lines."""
    return [part + _END for part in data.split(_END) if part]


def _failed_if_open(body: dict[str, Any]) -> dict[str, Any] | None:
    if body.get("status") not in ("queued", "in_progress"):
        return None
    error = {"code": "server_error", "message": "The server stopped before the response was finished."}
    return {**body, "status": "failed", "error": {**error, "param": None, "type": "server_error"}}
