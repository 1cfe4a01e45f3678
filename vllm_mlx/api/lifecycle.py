"""Whether the server takes requests, and how many are open."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_mlx.core.errors import ServerBusy


class Lifecycle:
    """Counts open requests and refuses new ones while draining. Used on the event loop only."""

    def __init__(self) -> None:
        self._num_open = 0
        self._is_draining = False
        self._is_warm = True
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_open(self) -> int:
        """HTTP requests whose answer has not ended."""
        return self._num_open

    @property
    def is_draining(self) -> bool:
        """Whether the server is about to stop."""
        return self._is_draining

    @property
    def is_warm(self) -> bool:
        """Whether what is to be computed before the server is ready has been."""
        return self._is_warm

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Not ready while the block runs; requests are answered all the same."""
        self._is_warm = False
        try:
            yield
        finally:
            self._is_warm = True

    def begin_drain(self) -> None:
        """Refuse new generation from now on; what runs goes on."""
        self._is_draining = True

    def admit(self) -> None:
        """Raise ServerBusy if no new generation may start."""
        if self._is_draining:
            raise ServerBusy("The server is shutting down; try again in a moment or elsewhere.", retry_after_s=5)

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Count one request while the block runs."""
        self._num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if self._num_open == 0:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is open; whether that came about in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
