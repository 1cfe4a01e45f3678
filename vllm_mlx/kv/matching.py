"""How far a sequence's tokens are known already: in pages, behind checkpoints, on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from vllm_mlx.core.cachespec import PageGroups
from vllm_mlx.kv.admission import CheckpointRules
from vllm_mlx.kv.blocks import PagePool, common_length, group_name, group_names
from vllm_mlx.kv.chains import Chains
from vllm_mlx.kv.checkpoints import Checkpoints
from vllm_mlx.kv.disk import DiskCache
from vllm_mlx.kv.order import SCRATCH_PAGE
from vllm_mlx.kv.tables import Table

IsThere = Callable[[bytes], object]
"""Whether something of that name can be had; by truth."""


class Match(msgspec.Struct, frozen=True):
    """The longest prefix that is in memory."""

    tables: tuple[list[int], ...]
    """Its pages in each group of layers; 0 for those that no window shows any more."""
    count: int = 0
    """Pages long, where there are pages and where there are none."""
    checkpoint: int | None = None

    @property
    def num_pages(self) -> int:
        """At most so many pages are in it."""
        return self.count * len(self.tables)

    @property
    def page_ids(self) -> list[int]:
        """The pages of all groups."""
        return [page_id for page_ids in self.tables for page_id in page_ids if page_id != SCRATCH_PAGE]


class Matcher:
    """Looks up prefixes; changes nothing but the names that tables remember.

    A prefix of so many pages is known if all of them are in groups without a window, those that the next tokens look
    back at are in the others, and a checkpoint is behind it if the model has `rules` for them.
    """

    def __init__(
        self, pool: PagePool, checkpoints: Checkpoints, groups: PageGroups, *, rules: CheckpointRules | None
    ) -> None:
        self._pool = pool
        self._checkpoints = checkpoints
        self._groups = groups
        self._page_size = groups.page_size
        self._all = range(len(groups.windows))
        self._windowed = [group for group in self._all if groups.windows[group] is not None]
        self._whole = [group for group in self._all if groups.windows[group] is None]
        self._rules = rules
        self._chains = Chains(page_size=groups.page_size)

    @property
    def nothing(self) -> Match:
        """No prefix at all."""
        return Match(tuple([] for _ in self._all))

    @property
    def needs_all(self) -> bool:
        """Whether a prefix needs every page of every prefix of it."""
        return not self._windowed

    def match(self, table: Table, token_ids: Sequence[int]) -> Match:
        """The longest known prefix of `token_ids`, at least one token short of them."""
        names = self._names(table, token_ids)
        runs = {group: self._pool.find_run(group_names(names, group)) for group in self._whole}
        reach = min(map(len, runs.values()), default=len(names))
        count = self._cut(names, reach, self._pool.find, self._has_checkpoint)
        found = [runs[group][:count] if group in runs else self._window(names, group, count) for group in self._all]
        checkpoint = self._checkpoints.find(names[count - 1]) if count and self._rules is not None else None
        return Match(tuple(found), count, checkpoint)

    def needed(self, names: Sequence[bytes], count: int) -> Iterable[bytes]:
        """Names of all pages that a prefix of `count` pages needs, from its beginning."""
        firsts = [self._first_page(group, count) for group in self._all]
        if firsts == [0]:
            return names[:count]
        return (
            group_name(names[index], group)
            for index in range(count)
            for group, first in enumerate(firsts)
            if index >= first
        )

    def tail(self, table: Table, token_ids: Sequence[int], count: int) -> tuple[tuple[int, ...], int]:
        """The partly filled page of each group behind the first `count`, and how many of its tokens are the next known.

        No pages if that is none.
        """
        if self._rules is not None or not self._all:
            return (), 0
        name, page_ids = table.tail_name(count), []
        known = token_ids[count * self._page_size : len(token_ids) - 1]
        num_equal = len(known)
        for group in self._all:
            found = self._pool.tail(group_name(name, group))
            if found is None:
                return (), 0
            page_ids.append(found[0])
            num_equal = min(num_equal, common_length(known, found[1]))
        return (tuple(page_ids), num_equal) if num_equal else ((), 0)

    def found(self, table: Table, token_ids: Sequence[int], *, disk: DiskCache | None) -> tuple[int, int]:
        """How many of these tokens are in memory, and how many more on disk."""
        match = self.match(table, token_ids)
        num_memory = match.count * self._page_size + self.tail(table, token_ids, match.count)[1]
        if disk is None:
            return num_memory, 0
        count, _, _ = self.on_disk(disk, table, token_ids, match)
        return num_memory, max(0, count * self._page_size - num_memory)

    def on_disk(
        self, disk: DiskCache, table: Table, token_ids: Sequence[int], match: Match
    ) -> tuple[int, list[bytes], bytes | None]:
        """How many pages long the prefix would be with what is on disk; which pages and which checkpoint to load."""
        names = self._names(table, token_ids)

        def is_there(name: bytes) -> object:
            return self._pool.find(name) or disk.has_page(name)

        def has_checkpoint(name: bytes) -> object:
            return self._has_checkpoint(name) or disk.has_checkpoint(name)

        reach = self._reach(names, is_there)
        while (count := self._cut(names, reach, is_there, has_checkpoint)) > match.count:
            needed = list(self.needed(names, count))
            missing = [name for name in needed if self._pool.find(name) is None]
            num_kept = sum(self._pool.is_kept(self._pool.find(name) or SCRATCH_PAGE) for name in needed)
            excess = len(missing) + num_kept - self._pool.num_free
            if excess <= 0:
                is_kept = self._rules is None or self._has_checkpoint(names[count - 1])
                return count, missing, None if is_kept else names[count - 1]
            reach = count - max(1, excess // len(self._all))
        return match.count, [], None

    def _names(self, table: Table, token_ids: Sequence[int]) -> list[bytes]:
        """Names of the full pages before the last token, in the first group."""
        most = (len(token_ids) - 1) // self._page_size
        if not table.names:
            table.names = self._chains.names(token_ids, most, salt=table.salt, blocks=table.blocks)
        return table.name_pages(token_ids, most, page_size=self._page_size)[:most]

    def _window(self, names: Sequence[bytes], group: int, count: int) -> list[int]:
        """The pages that a window shows behind the first `count`, which are there; 0 before them."""
        first = self._first_page(group, count)
        return [SCRATCH_PAGE] * first + self._pool.find_run(group_names(names[first:count], group))

    def _has_checkpoint(self, name: bytes) -> bool:
        return self._checkpoints.find(name) is not None

    def _first_page(self, group: int, count: int) -> int:
        return self._groups.first_page(group, count * self._page_size)

    def _reach(self, names: Sequence[bytes], is_there: IsThere) -> int:
        """How many pages follow each other from the first on in all groups without a window."""
        reach = len(names)
        for group in self._whole:
            missing = (i for i in range(reach) if not is_there(group_name(names[i], group)))
            reach = next(missing, reach)
        return reach

    def _cut(self, names: Sequence[bytes], reach: int, is_there: IsThere, has_checkpoint: IsThere) -> int:
        """The most of the first `reach` pages behind which a sequence can go on."""
        count = reach
        while count:
            if self._rules is not None and not has_checkpoint(names[count - 1]):
                count -= 1
                continue
            gap = self._gap(names, count, is_there)
            if gap is None:
                break
            count = gap  # whatever is cut between there and here needs the page that is missing
        return count

    def _gap(self, names: Sequence[bytes], count: int, is_there: IsThere) -> int | None:
        """A page that a window shows behind the first `count` and that is missing; None if there is none."""
        for group in self._windowed:
            for index in reversed(range(self._first_page(group, count), count)):
                if not is_there(group_name(names[index], group)):
                    return index
        return None
