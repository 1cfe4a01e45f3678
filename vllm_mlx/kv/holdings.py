"""Pages in the hands of sequences: handed out as they are needed, taken back once no window shows them any more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm_mlx.core.cachespec import MAX_CHUNKS_IN_FLIGHT, PageGroups
from vllm_mlx.kv.blocks import PagePool, group_name
from vllm_mlx.kv.matching import Match
from vllm_mlx.kv.order import SCRATCH_PAGE
from vllm_mlx.kv.tables import Table


class Holdings:
    """Gives tables their pages and takes them back.

    A sequence has its pages from the start in groups without a window. In those with one it gets them chunk by chunk,
    and gives back what is left behind; until its prompt is computed, what it will need at a time is promised to it:
    who comes later is admitted only if there is room besides. Chunks have at most `max_chunk` tokens.
    """

    def __init__(self, pool: PagePool, groups: PageGroups, *, max_chunk: int) -> None:
        self._pool = pool
        self._groups = groups
        self._page_size = groups.page_size
        self._backs = {group: groups.reach_back(group) for group in range(len(groups.windows))}
        self._windowed = {group: back for group, back in self._backs.items() if back is not None}
        self._num_new = 1 + self._num_pages(MAX_CHUNKS_IN_FLIGHT * max_chunk)
        self.num_promised = 0
        """Pages that sequences with a table will still take for their prompts."""

    def num_missing(self, match: Match, num_tokens: int, *, is_alone: bool) -> int:
        """Pages that a sequence of `num_tokens` needs at a time besides those in `match`.

        Who is alone makes do with the page that it writes to; then those in `match`, too, are given back for it.
        """
        num_rest = self._num_pages(num_tokens) - match.count
        num_missing = num_rest * (len(self._backs) - len(self._windowed))
        for group, back in self._windowed.items():
            num_shared = match.count - self._first_page(group, match.count)
            num_missing += min(num_rest, back + 1 - num_shared if is_alone else back + self._num_new)
        return num_missing

    def num_spare(self, match: Match, num_missing: int) -> int:
        """Pages that are free besides those in `match`, so many more, and those promised to others; less than none if
        these are too many.
        """
        num_free = self._pool.num_free - self.num_promised - num_missing
        if num_free >= match.num_pages + len(match.tables):
            return num_free - match.num_pages  # more than enough, even if nobody used what was found
        return num_free - self._pool.num_kept_of(match.page_ids)

    def begin(self, table: Table, match: Match, num_tokens: int, *, has_copy: bool) -> None:
        """Give a table its first pages, in every group one for a copy if it has one. The match is shared already.

        Raises ValueError if too few are free.
        """
        num_rest = self._num_pages(num_tokens) - match.count
        table.tables = tuple(
            (*match.tables[group], *self._pool.allocate(num_rest if back is None else has_copy))
            for group, back in self._backs.items()
        )
        table.first_pages = [self._first_page(group, match.count) for group in self._backs]
        table.num_wanted = num_tokens
        self._note_change(table)

    def extend(self, table: Table, num_tokens: int) -> bool:
        """Make a table cover `num_tokens` tokens; False, and nothing changed, if too few pages are free."""
        if num_tokens <= table.num_covered:
            return True
        num_pages = self._num_pages(num_tokens)
        counts = [max(0, num_pages - len(page_ids)) for page_ids in table.tables]
        if sum(counts) > self._pool.num_free:
            return False
        table.tables = tuple(
            page_ids + self._pool.allocate(count) if count else page_ids
            for page_ids, count in zip(table.tables, counts, strict=True)
        )
        self._note_change(table)
        return True

    def cover(self, table: Table, num_tokens: int) -> int:
        """Make a table cover `num_tokens` tokens, or as many as there are pages for; returns how many it covers."""
        if not self.extend(table, num_tokens):
            num_short = sum(len(page_ids) * self._page_size < num_tokens for page_ids in table.tables)
            self.extend(table, table.num_covered + self._pool.num_free // num_short * self._page_size)
        return min(num_tokens, table.num_covered)

    def name(self, table: Table, names: Sequence[bytes]) -> None:
        """Make pages that are full, from the first one on, findable by these names."""
        for group, page_ids in enumerate(table.tables):
            for index in range(table.num_named, len(names)):
                self._pool.set_name(page_ids[index], group_name(names[index], group))
        table.num_named = len(names)

    def name_tail(self, table: Table, token_ids: Sequence[int], *, num_computed: int) -> None:
        """Make the last page findable with what is in it, if it is partly filled."""
        start = table.num_named * self._page_size
        if start < num_computed <= len(token_ids):
            name, held = table.tail_name(table.num_named), tuple(token_ids[start:num_computed])
            for group, page_ids in enumerate(table.tables):
                self._pool.set_tail(page_ids[table.num_named], group_name(name, group), held)

    def leave_behind(self, table: Table, count: int) -> None:
        """Take back what no token behind the first `count` pages looks at; these have their names by now.

        Where a prompt may be cut again the pages that are in the window there are given back like others. Those
        between are the first to be evicted: a sequence would have to be cut right there to need them.
        """
        table.num_passed = count
        for group, back in self._windowed.items():
            begin, first = table.first_pages[group], self._first_page(group, count)
            if first <= begin:
                continue
            page_ids = table.tables[group]
            for index in range(begin, first):
                self._pool.release(page_ids[index], is_left_behind=not table.is_near_cut(index, back=back))
            left = (SCRATCH_PAGE,) * first + page_ids[first:]
            table.tables = (*table.tables[:group], left, *table.tables[group + 1 :])
            table.first_pages[group] = first
            self._note_change(table)

    def give_back(self, table: Table) -> None:
        """Take back all pages; those that nobody uses besides are evicted later than all given back before."""
        # The end first: a page is of no use without those before it, so it is the first to be evicted.
        for index in reversed(range(max(map(len, table.tables), default=0))):
            for page_ids in table.tables:
                if index < len(page_ids) and page_ids[index] != SCRATCH_PAGE:
                    self._pool.release(page_ids[index])
        for count in reversed([cut for cut in table.cuts if cut <= table.num_named] if self._windowed else ()):
            for group in self._windowed:
                for name in reversed(table.names[self._first_page(group, count) : count]):
                    # Otherwise they would go before the pages without a window, which end at the same place.
                    self._pool.touch(self._pool.find(group_name(name, group)) or SCRATCH_PAGE)
        table.tables = ()
        self._promise(table, 0)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _first_page(self, group: int, count: int) -> int:
        return self._groups.first_page(group, count * self._page_size)

    def _note_change(self, table: Table) -> None:
        table.row_tables = (table.page_ids, table.tables[1:])
        table.num_covered = min((len(each) * self._page_size for each in table.tables), default=sys.maxsize)
        num_promised, num_pages = 0, self._num_pages(table.num_wanted)
        for group, back in self._windowed.items():
            num_had = len(table.tables[group])
            num_held = num_had - table.first_pages[group]
            num_promised += max(0, min(num_pages - num_had, back + self._num_new - num_held))
        self._promise(table, num_promised)

    def _promise(self, table: Table, count: int) -> None:
        self.num_promised += count - table.num_promised
        table.num_promised = count
