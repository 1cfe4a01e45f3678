"""How far a sequence's tokens are known already: in pages, behind checkpoints, on disk."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_mlx.kv.admission import CheckpointRules
from vllm_mlx.kv.blocks import PagePool
from vllm_mlx.kv.checkpoints import Checkpoints
from vllm_mlx.kv.disk import DiskCache
from vllm_mlx.kv.tables import Table


class Match(msgspec.Struct, frozen=True):
    """The longest prefix that is in memory."""

    page_ids: list[int]
    count: int
    """Pages long, where there are pages and where there are none."""
    reach: int
    """Pages that could be shared if there were a checkpoint behind them."""
    checkpoint: int | None = None


class Matcher:
    """Looks up prefixes; changes nothing but the names that tables remember."""

    def __init__(
        self,
        pool: PagePool,
        checkpoints: Checkpoints,
        *,
        num_pages: int,
        page_size: int,
        rules: CheckpointRules | None,
    ) -> None:
        self._pool = pool
        self._checkpoints = checkpoints
        self._num_pages = num_pages
        self._page_size = page_size
        self._rules = rules

    def match(self, table: Table, token_ids: Sequence[int]) -> Match:
        """The longest known prefix of `token_ids`, at least one token short of them."""
        most = (len(token_ids) - 1) // self._page_size
        names = table.name_pages(token_ids, most, page_size=self._page_size)
        if not self._num_pages:
            return self._cut_to_checkpoint(names, [], most)
        page_ids: list[int] = []
        for name in names[:most]:
            page_id = self._pool.find(name)
            if page_id is None:
                break
            page_ids.append(page_id)
        if self._rules is None:
            return Match(page_ids, len(page_ids), len(page_ids))
        return self._cut_to_checkpoint(names, page_ids, len(page_ids))

    def _cut_to_checkpoint(self, names: list[bytes], page_ids: list[int], reach: int) -> Match:
        """Cut the first `reach` pages back to the last checkpoint among them."""
        for count in range(reach, 0, -1):
            number = self._checkpoints.find(names[count - 1])
            if number is not None:
                return Match(page_ids[:count], count, reach, number)
        return Match([], 0, reach)

    def tail(self, table: Table, token_ids: Sequence[int], count: int) -> tuple[int, int]:
        """The partly filled page behind the first `count` pages and how many of its tokens are the next known ones."""
        if self._rules is not None:
            return 0, 0
        found = self._pool.tail(table.tail_name(count))
        if found is None:
            return 0, 0
        page_id, held = found
        start = count * self._page_size
        num_equal = 0
        for ours, theirs in zip(token_ids[start : len(token_ids) - 1], held, strict=False):
            if ours != theirs:
                break
            num_equal += 1
        return page_id, num_equal

    def on_disk(
        self, disk: DiskCache, table: Table, token_ids: Sequence[int], match: Match
    ) -> tuple[int, list[bytes], bytes | None]:
        """How many pages long the prefix would be with what is on disk; which pages and which checkpoint to load."""
        most = (len(token_ids) - 1) // self._page_size
        names = table.name_pages(token_ids, most, page_size=self._page_size)
        reach = match.reach
        if self._num_pages:
            room = max(0, self._pool.num_free - sum(self._pool.is_kept(page_id) for page_id in match.page_ids))
            reach += disk.count(names[match.reach : min(most, match.reach + room)])
        if self._rules is None:
            return reach, names[match.reach : reach], None
        for count in range(reach, match.count, -1):
            name = names[count - 1]
            if self._checkpoints.find(name) is not None:
                return count, names[match.reach : count], None
            if disk.has_checkpoint(name):
                return count, names[match.reach : count] if self._num_pages else [], name
        return match.count, [], None
