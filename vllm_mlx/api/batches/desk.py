"""The store on a thread of its own, opened when it is first needed."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from vllm_mlx.api.batches.store import DATABASE, Store
from vllm_mlx.core import log
from vllm_mlx.core.errors import RequestError, one_line

T = TypeVar("T")
_log = log.get_logger("batches")


class StoreUnavailable(RequestError):
    """Files cannot be kept; the server's log says why."""

    status = 500
    code = "file_store_error"


class Desk:
    """Takes turns at the store. Used on one event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._store: Store | None = None

    @property
    def folder(self) -> Path:
        """Where everything is kept."""
        return self._folder

    @property
    def has_store(self) -> bool:
        """Whether anything was ever kept in the folder."""
        return (self._folder / DATABASE).exists()

    async def call(self, work: Callable[[Store], T]) -> T:
        """What `work` gives, called on the store's thread. Raises what it raises, and StoreUnavailable."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, work)

    async def close(self) -> None:
        """Wait for what is being done, then close the store. It may be called again, and opens the store again."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)

    def _call(self, work: Callable[[Store], T]) -> T:
        try:
            if self._store is None:
                self._store = Store(self._folder)
            return work(self._store)
        except (OSError, sqlite3.Error) as error:
            _log.error("files in %s cannot be kept: %s", self._folder, one_line(error))
            message = "The server cannot keep files now; its log has the reason."
            raise StoreUnavailable(message) from error

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()
