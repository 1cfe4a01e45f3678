"""Page tables of sequences, and the prefixes that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from vllm_mlx.kv.blocks import PagePool, page_name


class Admission(Enum):
    """Why a sequence gets no table now."""

    NO_ROOM = "no room"
    """Too few pages are free."""
    PREFIX_UNDER_WAY = "prefix under way"
    """Another sequence is computing the same prefix: waiting for it is cheaper than computing it again."""


@dataclass(slots=True)
class _Table:
    """A sequence's pages in order, and the names of the full ones."""

    salt: bytes
    page_ids: tuple[int, ...] = ()
    names: list[bytes] = field(default_factory=list)
    """Of full pages of known tokens, as far as they were needed."""
    num_named: int = 0
    """Pages that are full, in order; all of them have been offered under their names."""
    announced: list[bytes] = field(default_factory=list)
    """Names of the pages that this sequence has promised to fill."""


class KVManager:
    """Gives sequences pages of `page_size` tokens; ids only, the runner owns the memory.

    `num_pages` counts the scratch page 0. With `num_pages=0` no layer is paged: everything fits, and
    every table is empty. Unless `shares_prefixes`, every sequence computes all its tokens itself.
    """

    def __init__(self, num_pages: int, *, page_size: int, shares_prefixes: bool = True) -> None:
        self._num_pages = num_pages
        self._page_size = page_size
        self._shares_prefixes = shares_prefixes and num_pages > 0
        self._pool = PagePool(num_pages)
        self._tables: dict[str, _Table] = {}
        self._waiting: dict[str, _Table] = {}
        self._announced: dict[bytes, str] = {}

    @property
    def num_used(self) -> int:
        """Pages in use."""
        return self._pool.num_used

    @property
    def num_free(self) -> int:
        """Pages that can be reserved now, those of remembered prefixes included."""
        return self._pool.num_free

    @property
    def num_kept(self) -> int:
        """Pages of remembered prefixes that nobody uses."""
        return self._pool.num_kept

    @property
    def num_evicted(self) -> int:
        """Pages of remembered prefixes that were given to others."""
        return self._pool.num_evicted

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

    def admit(
        self, seq_id: str, token_ids: Sequence[int], *, num_tokens: int, headroom: int = 0, salt: bytes = b""
    ) -> int | Admission:
        """Give a sequence without a table one that covers `num_tokens` tokens, `token_ids` being the known ones.

        Returns how many of its tokens are in its pages already: a prefix that others computed, whole pages of it, and
        never all known tokens, because the last one must be computed to go on. `headroom` pages stay free besides.
        """
        table = self._waiting.setdefault(seq_id, _Table(salt))
        shared = self._match(table, token_ids)
        num_full = len(token_ids) // self._page_size if self._shares_prefixes else 0
        if len(shared) < self._num_matchable(token_ids) and table.names[len(shared)] in self._announced:
            return Admission.PREFIX_UNDER_WAY
        num_missing = self.pages_for(num_tokens) - len(shared)
        num_kept = sum(self._pool.is_kept(page_id) for page_id in shared)
        if num_missing + headroom > self._pool.num_free - num_kept:
            return Admission.NO_ROOM
        for page_id in shared:
            self._pool.share(page_id)
        table.page_ids = (*shared, *self._pool.allocate(num_missing))
        table.num_named = len(shared)
        table.announced = [
            name for name in self._names(table, token_ids, num_full)[len(shared) :] if name not in self._announced
        ]
        self._announced.update(dict.fromkeys(table.announced, seq_id))
        self._tables[seq_id] = self._waiting.pop(seq_id)
        return len(shared) * self._page_size

    def reserve(self, seq_id: str, num_tokens: int) -> bool:
        """Make the table of `seq_id` cover `num_tokens` tokens; False, and nothing changed, if too few are free."""
        table = self._tables[seq_id]
        num_held = len(table.page_ids)
        if num_tokens <= num_held * self._page_size:
            return True
        num_missing = self.pages_for(num_tokens) - num_held
        if num_missing > self._pool.num_free:
            return False
        if num_missing > 0:
            table.page_ids += self._pool.allocate(num_missing)
        return True

    def commit(self, seq_id: str, token_ids: Sequence[int], *, num_computed: int) -> None:
        """Offer the pages that are full: the first `num_computed` of the sequence's `token_ids` are in its pages."""
        table = self._tables[seq_id]
        num_full = num_computed // self._page_size
        if num_full <= table.num_named or not self._shares_prefixes:
            return
        names = self._names(table, token_ids, num_full)
        for index in range(table.num_named, num_full):
            self._pool.set_name(table.page_ids[index], names[index])
            if self._announced.get(names[index]) == seq_id:
                del self._announced[names[index]]
        table.num_named = num_full

    def release(self, seq_id: str) -> None:
        """Give back all pages of a sequence, or forget that it waits; one that is not known is ignored."""
        self._waiting.pop(seq_id, None)
        table = self._tables.pop(seq_id, None)
        if table is None:
            return
        for name in table.announced:
            if self._announced.get(name) == seq_id:
                del self._announced[name]
        # The end first: a page is of no use without those before it, so it is the first to be evicted.
        for page_id in reversed(table.page_ids):
            self._pool.release(page_id)

    def lookup(self, token_ids: Sequence[int], *, salt: bytes = b"") -> int:
        """How many of these tokens `admit` would find in pages now; changes nothing."""
        return len(self._match(_Table(salt), token_ids)) * self._page_size

    def forget(self) -> int:
        """Drop all remembered prefixes; returns how many pages that freed."""
        return self._pool.forget()

    def page_ids(self, seq_id: str) -> tuple[int, ...]:
        """The sequence's page table; empty if it has none. The same object until pages are added."""
        table = self._tables.get(seq_id)
        return table.page_ids if table else ()

    def find(self, name: bytes) -> int | None:
        """The page of that name (see `blocks.page_name`), in use or remembered."""
        return self._pool.find(name)

    def check(self) -> None:
        """Raise AssertionError if a page is lost, miscounted, or both free and used. For tests: looks at all pages."""
        num_users = Counter(page for table in self._tables.values() for page in table.page_ids)
        self._pool.check(dict(num_users), num_pages=self._num_pages)
        assert not set(self._tables) & set(self._waiting), "a sequence with a table waits for one"
        for seq_id, table in self._tables.items():
            assert table.num_named <= len(table.page_ids), f"{seq_id}: more names than pages"
            assert len(set(table.page_ids)) == len(table.page_ids), f"{seq_id}: a page twice in one table"
        for name, seq_id in self._announced.items():
            assert name in self._tables[seq_id].announced, f"{seq_id} does not know what it announced"

    def _match(self, table: _Table, token_ids: Sequence[int]) -> list[int]:
        """Pages of the longest known prefix of `token_ids`."""
        shared: list[int] = []
        for index in range(self._num_matchable(token_ids)):
            page_id = self._pool.find(self._names(table, token_ids, index + 1)[index])
            if page_id is None:
                break
            shared.append(page_id)
        return shared

    def _num_matchable(self, token_ids: Sequence[int]) -> int:
        """Full pages that may be shared: at least one token is left to compute."""
        return (len(token_ids) - 1) // self._page_size if self._shares_prefixes else 0

    def _names(self, table: _Table, token_ids: Sequence[int], count: int) -> list[bytes]:
        """Names of at least the first `count` pages; each is computed once."""
        names = table.names
        while len(names) < count:
            start = len(names) * self._page_size
            tokens = token_ids[start : start + self._page_size]
            names.append(page_name(names[-1] if names else b"", tokens, salt=table.salt))
        return names
