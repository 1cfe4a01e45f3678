"""Pages that are to stay until the cache is cleared."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_mlx.kv.blocks import PagePool
from vllm_mlx.kv.disk import DiskCache
from vllm_mlx.kv.tiers.record import Kind

MAX_PINNED_SHARE = 2
"""At most one page in so many is pinned, so that others can still be served."""


class Pins:
    """One user more of some pages, who never leaves by itself."""

    def __init__(self, pool: PagePool, disk: DiskCache | None, *, num_pages: int) -> None:
        self._pool = pool
        self._disk = disk
        self._most = (num_pages - 1) // MAX_PINNED_SHARE
        self.page_ids: set[int] = set()
        """What is pinned."""

    def __len__(self) -> int:
        return len(self.page_ids)

    def add(self, names: Iterable[bytes]) -> None:
        """Pin the pages of these names, as far as they are in memory and others keep enough."""
        for name in names:
            page_id = self._pool.find(name)
            if page_id is None or page_id in self.page_ids:
                continue
            if len(self.page_ids) >= self._most:
                return
            self._pool.share(page_id)
            self.page_ids.add(page_id)
            if self._disk is not None:
                self._disk.offer(Kind.PAGE, name)

    def clear(self) -> None:
        """Let all of them go."""
        for page_id in self.page_ids:
            self._pool.release(page_id)
        self.page_ids.clear()
