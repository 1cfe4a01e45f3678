"""Pages that are to stay: until the cache is cleared, or for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from vllm_mlx.kv.blocks import PagePool
from vllm_mlx.kv.checkpoints import Checkpoints
from vllm_mlx.kv.disk import DiskCache
from vllm_mlx.kv.matching import Matcher
from vllm_mlx.kv.tables import Table
from vllm_mlx.kv.tiers.record import Kind

MAX_PINNED_SHARE = 2
"""At most one page in so many is pinned, so that others can still be served."""


class Pins:
    """One user more of some pages, who never leaves by itself."""

    def __init__(
        self,
        pool: PagePool,
        checkpoints: Checkpoints,
        matcher: Matcher,
        disk: DiskCache | None,
        *,
        num_pages: int,
        page_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._checkpoints = checkpoints
        self._matcher = matcher
        self._page_size = page_size
        self._disk = disk
        self._clock = clock
        self._most = (num_pages - 1) // MAX_PINNED_SHARE
        self.page_ids: set[int] = set()
        """What is pinned."""

    def __len__(self) -> int:
        return len(self.page_ids)

    def keep(self, table: Table) -> None:
        """Let stay what its request wants to be kept of a prompt that is computed, and what prompts need that part from
        a pinned one at its end, or elsewhere.
        """
        now, longest_s = self._clock(), 0
        for num_tokens, keep_s in reversed(table.keeps):
            count = min(num_tokens // self._page_size, table.num_named)
            is_among = self._matcher.needs_all and keep_s <= longest_s  # those of a longer beginning
            self._promise(table.names[:count], until=now + keep_s, is_state_only=is_among)
            longest_s = max(keep_s, longest_s)
        if table.is_pinned and table.tables:
            for count in table.cuts or [table.num_named]:
                self._pin(self._matcher.needed(table.names, count))

    def _promise(self, names: Sequence[bytes], *, until: float, is_state_only: bool) -> None:
        """Let the first pages, and the state behind them, be given up last."""
        if not is_state_only:
            self._pool.promise(self._matcher.needed(names, len(names)), until=until)
        if names:
            self._checkpoints.promise(names[-1], until=until)

    def _pin(self, names: Iterable[bytes]) -> None:
        """Pin the pages of these names, as far as they are in memory and others keep enough."""
        for name in names:
            page_id = self._pool.find(name)
            if page_id is None or page_id in self.page_ids:
                continue
            if len(self.page_ids) >= self._most:
                return
            self._pool.share([page_id])
            self.page_ids.add(page_id)
            if self._disk is not None:
                self._disk.offer(Kind.PAGE, name)

    def clear(self) -> None:
        """Let all of them go."""
        for page_id in self.page_ids:
            self._pool.release(page_id)
        self.page_ids.clear()
