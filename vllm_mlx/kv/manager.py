"""Page tables of sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mlx.kv.blocks import PagePool, page_name


@dataclass(slots=True)
class _Table:
    """A sequence's pages in order, and how many of them are named."""

    page_ids: tuple[int, ...] = ()
    num_named: int = 0
    last_name: bytes = b""


class KVManager:
    """Gives sequences pages of `page_size` tokens; ids only, the runner owns the memory.

    `num_pages` counts the scratch page 0. With `num_pages=0` no layer is paged: everything fits, and
    every table is empty.
    """

    def __init__(self, num_pages: int, *, page_size: int) -> None:
        self._num_pages = num_pages
        self._page_size = page_size
        self._pool = PagePool(num_pages)
        self._tables: dict[str, _Table] = {}

    @property
    def num_used(self) -> int:
        """Pages in use."""
        return self._pool.num_used

    @property
    def num_free(self) -> int:
        """Pages that can be reserved now."""
        return self._pool.num_free

    @property
    def num_usable(self) -> int:
        """Pages that a sequence alone could have."""
        return max(0, self._num_pages - 1)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold `num_tokens` tokens."""
        return -(-num_tokens // self._page_size) if self._num_pages else 0

    def could_fit(self, num_tokens: int) -> bool:
        """Whether `num_tokens` tokens fit if nobody else uses a page."""
        return self.pages_for(num_tokens) <= self.num_usable

    def reserve(self, seq_id: str, num_tokens: int) -> bool:
        """Make the table of `seq_id` cover `num_tokens` tokens; False, and nothing changed, if too few are free."""
        table = self._tables.get(seq_id)
        num_held = len(table.page_ids) if table else 0
        if table and num_tokens <= num_held * self._page_size:
            return True
        num_missing = self.pages_for(num_tokens) - num_held
        if num_missing > self._pool.num_free:
            return False
        if table is None:
            table = self._tables[seq_id] = _Table()
        if num_missing > 0:
            table.page_ids += self._pool.allocate(num_missing)
        return True

    def commit(self, seq_id: str, token_ids: Sequence[int], *, num_computed: int, salt: bytes = b"") -> None:
        """Name the pages that are full: the first `num_computed` of the sequence's `token_ids` are in its pages."""
        table = self._tables[seq_id]
        num_full = num_computed // self._page_size
        if num_full <= table.num_named:
            return
        num_full = min(num_full, len(table.page_ids))
        while table.num_named < num_full:
            start = table.num_named * self._page_size
            tokens = token_ids[start : start + self._page_size]
            table.last_name = page_name(table.last_name, tokens, salt=salt)
            self._pool.set_name(table.page_ids[table.num_named], table.last_name)
            table.num_named += 1

    def release(self, seq_id: str) -> None:
        """Give back all pages of a sequence; one that has no table is ignored."""
        table = self._tables.pop(seq_id, _Table())
        for page_id in table.page_ids:
            self._pool.release(page_id)

    def page_ids(self, seq_id: str) -> tuple[int, ...]:
        """The sequence's page table; empty if it has none. The same object until pages are added."""
        table = self._tables.get(seq_id)
        return table.page_ids if table else ()

    def find(self, name: bytes) -> int | None:
        """The page of that name (see `blocks.page_name`), if a sequence holds one."""
        return self._pool.find(name)

    def check(self) -> None:
        """Raise AssertionError if a page is lost, miscounted, or both free and used. For tests: looks at all pages."""
        num_users = Counter(page for table in self._tables.values() for page in table.page_ids)
        self._pool.check(dict(num_users), num_pages=self._num_pages)
        for seq_id, table in self._tables.items():
            assert table.num_named <= len(table.page_ids), f"{seq_id}: more names than pages"
            assert len(set(table.page_ids)) == len(table.page_ids), f"{seq_id}: a page twice in one table"
