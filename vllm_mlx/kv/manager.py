"""Page tables of sequences, and the prefixes that they share."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence

from vllm_mlx.core.cachespec import PageGroups
from vllm_mlx.core.messages import CacheFreed, Stats
from vllm_mlx.core.step import Staged
from vllm_mlx.kv.admission import Admission, Admitted, CheckpointRules, Orders
from vllm_mlx.kv.blocks import PagePool, group_name
from vllm_mlx.kv.checkpoint_plan import CheckpointPlan
from vllm_mlx.kv.checkpoints import Checkpoints
from vllm_mlx.kv.disk import DiskCache, Export
from vllm_mlx.kv.holdings import Holdings
from vllm_mlx.kv.loading import Loader
from vllm_mlx.kv.matching import Match, Matcher
from vllm_mlx.kv.pins import Pins
from vllm_mlx.kv.tables import Table, cuts, stops
from vllm_mlx.kv.tiers.record import Kind
from vllm_mlx.kv.under_way import UnderWay

__all__ = ["Admission", "Admitted", "CheckpointRules", "KVManager", "Orders"]


class KVManager:
    """Gives sequences pages of `page_size` tokens; ids only, the runner owns the memory.

    `num_pages` counts the scratch page 0. A page is of one group of layers at a time; a sequence has a table for each
    of the `windows` (see `PageGroups`), and chunks of at most `max_chunk` tokens. With `num_pages=0` no layer is paged:
    everything fits, and every table is empty. Unless `shares_prefixes`, every sequence computes all its tokens itself.
    A model with state outside pages has `rules`: of its prefixes only those are shared that end at a checkpoint.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        page_size: int,
        windows: tuple[int | None, ...] = (None,),
        max_chunk: int = 2048,
        shares_prefixes: bool = True,
        rules: CheckpointRules | None = None,
        disk: DiskCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_pages = num_pages
        self._page_size = page_size
        self._rules = rules
        # What is outside pages can be shared by checkpoints only.
        self._shares_prefixes = shares_prefixes and (num_pages > 0 if rules is None else rules.max_bytes > 0)
        self._pool = PagePool(num_pages, clock=clock)
        self._checkpoints = Checkpoints(rules.max_bytes if rules else 0, clock=clock)
        self._plan = CheckpointPlan(self._checkpoints, rules=rules, page_size=page_size)
        self._groups = PageGroups(windows if num_pages else (), page_size)
        self._has_windows = self._groups.has_windows
        self._matcher = Matcher(self._pool, self._checkpoints, self._groups, rules=rules)
        self._holdings = Holdings(self._pool, self._groups, max_chunk=max_chunk)
        loads = disk is not None and self._shares_prefixes
        self._loader = Loader(disk, self._matcher, self._pool, self._checkpoints) if disk and loads else None
        self._tables: dict[str, Table] = {}
        self._waiting: dict[str, Table] = {}
        self._under_way = UnderWay()
        kept = (self._pool, self._checkpoints, self._matcher, disk if loads else None)
        self._pins = Pins(*kept, num_pages=num_pages, page_size=page_size, clock=clock)
        self._copies: list[tuple[int, int]] = []
        self._fitting = self.most_tokens if self.num_usable else None

    @property
    def num_used(self) -> int:
        """Pages in use, pinned ones included."""
        return self._pool.num_used

    @property
    def num_free(self) -> int:
        """Pages that can be reserved now, those of remembered prefixes included."""
        return self._pool.num_free

    @property
    def num_pinned(self) -> int:
        """Pages that are never given to others."""
        return len(self._pins)

    @property
    def num_usable(self) -> int:
        """Pages that a sequence alone could have."""
        return max(0, self._num_pages - 1 - len(self._pins))

    @property
    def most_tokens(self) -> int | None:
        """The longest sequence that has room if nobody else uses a page; None if there is no end to it."""
        return self._groups.most_tokens(self.num_usable)

    @property
    def num_reading(self) -> int:
        """Sequences that wait for the disk."""
        return self._loader.disk.num_loading if self._loader else 0

    def figures(self) -> Stats:
        """The manager's part of `Stats`."""
        return Stats(
            pages_used=self._pool.num_used,
            pages_free=self._pool.num_free,
            pages_kept=self._pool.num_kept,
            pages_pinned=len(self._pins),
            num_evicted_pages=self._pool.num_evicted,
            num_checkpoints=len(self._checkpoints),
            num_loading=self.num_reading,
        )

    @property
    def has_orders(self) -> bool:
        """Whether the runner should be told something although no sequence has work for it."""
        return self._checkpoints.has_dropped or (self._loader is not None and self._loader.has_orders)

    def could_fit(self, num_tokens: int, *, token_ids: Sequence[int] = (), salt: bytes = b"") -> bool:
        """Whether `num_tokens` tokens, of which `token_ids` are known, fit if nobody else uses a page."""
        if self._fitting is not None and num_tokens <= self._fitting and not self._pins:
            return True
        num_missing = self._groups.pages_for(num_tokens) - self.num_usable
        if num_missing <= 0 or not self._pins:
            return num_missing <= 0
        tables = zip(self._match(Table(salt), token_ids).tables, self._groups.windows, strict=True)
        # What is pinned in a window is of no use any more when that has moved on.
        shared = {page_id for page_ids, window in tables if window is None for page_id in page_ids}
        return num_missing <= len(shared & self._pins.page_ids)

    # ---- the life of a sequence ----

    def begin_pass(self) -> None:
        """Waiting sequences will be admitted now, as far as they can be, in their order."""
        if self._loader is not None:
            self._loader.begin_pass()

    def admit(
        self,
        seq_id: str,
        token_ids: Sequence[int],
        *,
        num_tokens: int,
        headroom: int = 0,
        salt: bytes = b"",
        breakpoints: tuple[int, ...] = (),
        is_pinned: bool = False,
        keeps: tuple[tuple[int, int], ...] = (),
        blocks: tuple[int, ...] = (),
    ) -> Admitted | Admission:
        """Give a sequence without a table one that covers `num_tokens` tokens, `token_ids` being the known ones.

        `headroom` pages stay free besides. `breakpoints` are lengths of its beginnings that others may share; what
        is pinned stays until `forget`. `keeps` are beginnings that are given up last: tokens, and for how many seconds.
        `blocks`: see `Prompt`.
        """
        table = self._table_of(seq_id, salt, blocks)
        table.breakpoints, table.is_pinned, table.keeps = breakpoints, is_pinned, keeps
        if table.awaited in self._under_way:
            return Admission.PREFIX_UNDER_WAY
        if self._loader is not None and self._loader.is_waiting(seq_id, table):
            return Admission.READING
        match = self._match(table, token_ids)
        table.awaited = self._last_under_way(table, token_ids, match.count)
        if table.awaited is not None:
            return Admission.PREFIX_UNDER_WAY
        num_missing = self._holdings.num_missing(match, num_tokens, is_alone=not self._tables)
        num_spare = self._holdings.num_spare(match, num_missing + headroom)
        if num_spare < 0:
            return Admission.NO_ROOM
        if self._loader is not None and self._loader.begin(seq_id, table, token_ids, match):
            return Admission.READING
        self._share(match, table.names)
        sources, num_copied = self._matcher.tail(table, token_ids, match.count)
        if num_spare < len(sources):
            sources, num_copied = (), 0
        self._pool.share(sources)  # until the copies are on their way, see `take_orders`
        self._holdings.begin(table, match, num_tokens, has_copy=bool(sources))
        self._copies += (
            (source, page_ids[match.count]) for source, page_ids in zip(sources, table.tables, strict=False)
        )
        self._begin(seq_id, table, token_ids, match)
        self._tables[seq_id] = self._waiting.pop(seq_id)
        if self._loader is not None:
            self._loader.leave(seq_id)
        return Admitted(match.count * self._page_size + num_copied, match.checkpoint)

    def reserve(self, seq_id: str, num_tokens: int) -> bool:
        """Make the tables of `seq_id` cover `num_tokens` tokens; False, and nothing changed, if too few are free."""
        table = self._tables[seq_id]
        return num_tokens <= table.num_covered or self._holdings.extend(table, num_tokens)

    def cover(self, seq_id: str, num_tokens: int) -> int:
        """Make its tables cover `num_tokens` tokens, or as many as there is room for; returns for how many they do."""
        return self._holdings.cover(self._tables[seq_id], num_tokens)

    def next_stop(self, seq_id: str, start: int) -> int | None:
        """Where a chunk that begins at `start` must end at the latest, for a state is to be kept there."""
        table = self._tables.get(seq_id)
        index = bisect_right(table.stops, start) if table else 0
        return table.stops[index] if table and index < len(table.stops) else None

    def checkpoint_due(self, seq_id: str, num_computed: int) -> int | None:
        """The number of the checkpoint to take once `num_computed` tokens are computed; None if none is due."""
        return self._plan.due(self._tables[seq_id], num_computed) if self._shares_prefixes else None

    def let_on(self) -> bool:
        """Whether sequences waited for a prefix that nobody has to compute any more; from now on they do not."""
        let_on = [each for each in self._waiting.values() if each.awaited and each.awaited not in self._under_way]
        for table in let_on:
            table.awaited = None
        return bool(let_on)

    def keep_checkpoint(
        self, seq_id: str, number: int, token_ids: Sequence[int], *, num_computed: int, size_bytes: int
    ) -> None:
        """A checkpoint was taken behind the first `num_computed` tokens of a sequence that has a table."""
        table = self._tables[seq_id]
        mine = self._plan.keep(table, number, token_ids, num_computed=num_computed, size_bytes=size_bytes)
        self._under_way.retract(seq_id, mine)

    def drop_checkpoint(self, number: int) -> None:
        """A checkpoint was taken that is of no use any more."""
        self._checkpoints.drop(number)

    def publish(self, seq_id: str, token_ids: Sequence[int], *, num_computed: int) -> None:
        """A step is planned that computes these tokens: later ones may use their pages, if no state belongs to them."""
        if self._shares_prefixes and self._rules is None:
            self._offer(seq_id, self._tables[seq_id], token_ids, num_computed)

    def commit(self, seq_id: str, token_ids: Sequence[int], *, num_computed: int) -> None:
        """Offer the pages that are full: the first `num_computed` of the sequence's `token_ids` are in its pages."""
        table, num_full = self._tables[seq_id], num_computed // self._page_size
        table.num_computed = num_computed
        if self._shares_prefixes:
            self._offer(seq_id, table, token_ids, num_computed)
            if num_computed == table.num_known:
                self._under_way.retract(seq_id, table.announced)
                self._pins.keep(table)
        if self._has_windows and num_full > table.num_passed:
            self._holdings.leave_behind(table, num_full)

    def release(self, seq_id: str, token_ids: Sequence[int] = ()) -> None:
        """Give back all pages of a sequence, or forget that it waits; one that is not known is ignored.

        With its `token_ids` the last page, which is not full, is remembered too.
        """
        self._waiting.pop(seq_id, None)
        if self._loader is not None:
            self._loader.leave(seq_id)
        table = self._tables.get(seq_id)
        if table is None:
            return
        self._under_way.retract(seq_id, table.announced)
        self._keep_tail(table, token_ids, table.num_computed)
        del self._tables[seq_id]
        self._holdings.give_back(table)

    # ---- what is remembered ----

    def lookup(self, token_ids: Sequence[int], *, salt: bytes = b"") -> tuple[int, int]:
        """How many of these tokens `admit` would find in memory now, and how many more on disk; changes nothing."""
        return self._found(Table(salt), token_ids)

    def expect(self, seq_id: str, token_ids: Sequence[int], *, salt: bytes = b"", blocks: tuple[int, ...] = ()) -> int:
        """How many of its tokens `admit` would find now, in memory or on disk, for a sequence without a table.

        Names of its pages, and what it waits for, are kept for `admit`, which is to follow, or `release`.
        """
        table = self._table_of(seq_id, salt, blocks)
        num_memory, num_stored = self._found(table, token_ids)
        table.awaited = self._last_under_way(table, token_ids, num_memory // self._page_size)
        return num_memory + num_stored

    def _table_of(self, seq_id: str, salt: bytes, blocks: tuple[int, ...]) -> Table:
        """What is known of a sequence that waits."""
        return self._waiting.get(seq_id) or self._waiting.setdefault(seq_id, Table(salt, blocks=blocks))

    def _found(self, table: Table, token_ids: Sequence[int]) -> tuple[int, int]:
        """How many of these tokens are in memory, and how many more on disk."""
        disk = self._loader.disk if self._loader else None
        return self._matcher.found(table, token_ids, disk=disk) if self._shares_prefixes else (0, 0)

    def forget(self) -> CacheFreed:
        """Drop all remembered prefixes, pinned ones too."""
        self._pins.clear()
        num_stored = self._loader.disk.forget() if self._loader else 0
        return CacheFreed(self._pool.forget(), self._checkpoints.forget(), num_stored)

    def take_orders(self, *, max_exports: int) -> Orders:
        """What the next step is to do for the cache. Called once per step, after everybody was admitted."""
        exports = self._loader.take_exports(max_exports) if self._loader else ()
        imports, checkpoint_imports = self._loader.take_imports() if self._loader else ((), ())
        orders = Orders(
            exports=exports,
            dropped=self._checkpoints.take_dropped(),
            imports=imports,
            checkpoint_imports=checkpoint_imports,
            copies=tuple(self._copies),
        )
        for source, _ in self._copies:
            self._pool.release(source)
        self._copies.clear()
        return orders

    def store(self, exports: Sequence[Export], payloads: Sequence[Staged]) -> None:
        """The bytes of what was exported."""
        assert self._loader is not None
        self._loader.disk.store(exports, payloads)

    def page_ids(self, seq_id: str) -> tuple[int, ...]:
        """The sequence's page table of the first group; empty if it has none. The same object until it changes."""
        table = self._tables.get(seq_id)
        return table.page_ids if table else ()

    def row_tables(self, seq_id: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Its page tables of the first group and of the others; each is the same object until it changes."""
        return self._tables[seq_id].row_tables

    def check(self) -> None:
        """Raise AssertionError if a page is lost, miscounted, or both free and used. For tests: looks at all pages."""
        num_users = Counter(page for table in self._tables.values() for page in table.held)
        num_users.update(self._pins.page_ids)
        num_users.update(source for source, _ in self._copies)
        self._pool.check(dict(num_users), num_pages=self._num_pages)
        self._checkpoints.check()
        assert not set(self._tables) & set(self._waiting), "a sequence with a table waits for one"
        for table in self._tables.values():
            table.check()
        num_promised = sum(table.num_promised for table in self._tables.values())
        assert num_promised == self._holdings.num_promised, "promised pages are miscounted"
        for name, seq_id in self._under_way.owned():
            assert name in self._tables[seq_id].announced, f"{seq_id} does not know what it announced"

    # ---- matching ----

    def _match(self, table: Table, token_ids: Sequence[int]) -> Match:
        """The longest prefix in memory; none if prefixes are not shared."""
        return self._matcher.match(table, token_ids) if self._shares_prefixes else self._matcher.nothing

    def _last_under_way(self, table: Table, token_ids: Sequence[int], count: int) -> bytes | None:
        """The last name behind the first `count` that somebody else is about to have; None if nobody is."""
        most = (len(token_ids) - 1) // self._page_size
        if not self._under_way or count >= most:
            return None
        names = table.name_pages(token_ids, most, page_size=self._page_size)[count:most]
        # Pages are of use without a gap only.
        return self._under_way.last_of(names, without_gap=self._rules is None)

    def _share(self, match: Match, names: Sequence[bytes]) -> None:
        """Use what was found, and offer to the disk what is used for the second time."""
        for group, page_ids in enumerate(match.tables):
            for index in self._pool.share(page_ids):
                if self._loader is not None:
                    self._loader.disk.offer(Kind.PAGE, group_name(names[index], group))
        if match.checkpoint is not None and self._checkpoints.use(match.checkpoint) and self._loader is not None:
            # By the name that it was found by: of rows, that is where this prompt and the one before part.
            size = self._checkpoints.size_of(match.checkpoint)
            self._loader.disk.offer(Kind.CHECKPOINT, names[match.count - 1], size_bytes=size)

    # ---- beginning and keeping ----

    def _begin(self, seq_id: str, table: Table, token_ids: Sequence[int], match: Match) -> None:
        """Note where the sequence stands, and announce what it is about to compute."""
        table.num_known, table.num_named = len(token_ids), match.count
        if not self._shares_prefixes:
            return
        num_full = len(token_ids) // self._page_size
        if self._has_windows:
            table.cuts = cuts(
                table.breakpoints, num_shared=match.count, num_known=len(token_ids), page_size=self._page_size
            )
        names = table.name_pages(token_ids, num_full, page_size=self._page_size)
        promised = names[match.count : num_full]
        rules = self._rules
        if rules is not None and not rules.can_be_cut:
            table.stops = stops(
                table.breakpoints,
                start=match.count * self._page_size,
                num_known=len(token_ids),
                page_size=self._page_size,
                interval=rules.interval,
            )
            promised = [names[stop // self._page_size - 1] for stop in table.stops]
        table.announced = self._under_way.announce(seq_id, promised)

    def _offer(self, seq_id: str, table: Table, token_ids: Sequence[int], num_computed: int) -> None:
        """Make findable what so many of its tokens fill, and the rest at the end of those that are known."""
        named, num_full = table.num_named, num_computed // self._page_size
        if num_full > named:
            names = table.name_pages(token_ids, num_full, page_size=self._page_size)
            self._holdings.name(table, names[:num_full])
            if self._rules is None:
                self._under_way.retract(seq_id, names[named:num_full])
        if num_computed == table.num_known:
            self._keep_tail(table, token_ids, num_computed)

    def _keep_tail(self, table: Table, token_ids: Sequence[int], num_computed: int) -> None:
        if self._rules is None and self._shares_prefixes:
            self._holdings.name_tail(table, token_ids, num_computed=num_computed)
