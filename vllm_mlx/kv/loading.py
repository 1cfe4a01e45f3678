"""Prefixes that are on disk: loaded ahead while their sequence waits, then remembered as if they had been computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_mlx.kv.blocks import PagePool
from vllm_mlx.kv.checkpoints import Checkpoints
from vllm_mlx.kv.disk import DiskCache, Export
from vllm_mlx.kv.matching import Match, Matcher
from vllm_mlx.kv.tables import Table
from vllm_mlx.kv.tiers.record import Kind

_Wanted = tuple[Kind, bytes]


class _Reader(NamedTuple):
    """A sequence that waits for what it asked of the disk."""

    table: Table
    num_pages: int
    """That it counts on, and that nobody uses: those to come, and those before them."""
    wanted: list[_Wanted]
    """What it asked for."""
    held: list[int]
    """Pages that are not to be given to others meanwhile."""


class Loader:
    """Moves pages and checkpoints between the disk and memory; what the runner must do for it is collected.

    What is loaded is in nobody's use until its sequence has a table. So that several who read do not take the place of
    each other's pages, one begins only if there is room for it beside what those count on who read already; and if one
    has to wait for that, nobody behind it begins either (see `begin_pass`). What somebody is loading already is waited
    for. Whoever waits takes in what has come for those it waits for, since they may not be looked at for long.
    """

    def __init__(self, disk: DiskCache, matcher: Matcher, pool: PagePool, checkpoints: Checkpoints) -> None:
        self.disk = disk
        self._matcher = matcher
        self._pool = pool
        self._checkpoints = checkpoints
        self._readers: dict[str, _Reader] = {}
        self._num_done = 0
        """Readers that read no more."""
        self._may_begin = True
        """Whether nobody was told to wait for room in this pass."""
        self._without_room: dict[str, int] = {}
        """Who was told so, and `num_done` when there was too little room; less if it was not looked at."""
        self._coming: dict[_Wanted, str] = {}
        """What was asked for and did not come yet, and by whom."""
        self._awaited: dict[str, _Wanted] = {}
        """What others are loading, by who waits for it."""
        self.imports: dict[int, bytes] = {}
        """Payloads by page id, for the next step. A page that changed hands since comes in once, with the last."""
        self.checkpoint_imports: dict[int, bytes] = {}

    def begin_pass(self) -> None:
        """Waiting sequences are looked at from now on, in their order; some at the end may be left out."""
        self._may_begin = True

    def is_waiting(self, seq_id: str, table: Table) -> bool:
        """Take what has come for a sequence without a table; whether more is to come, or it is not its turn."""
        if table.was_read:
            return False
        awaited = self._awaited.get(seq_id)
        if awaited is not None:
            self._take(self._coming.get(awaited))
            if awaited in self._coming:
                return True
            del self._awaited[seq_id]
        if seq_id in self._without_room:
            if self._may_begin:
                for other in list(self._readers):
                    self._take(other)
            self._may_begin = self._may_begin and self._is_worth_a_look(seq_id)
            return not self._may_begin
        self._take(seq_id)
        return seq_id in self._readers

    def begin(self, seq_id: str, table: Table, token_ids: Sequence[int], match: Match) -> bool:
        """Ask the disk for what a sequence lacks beyond `match`, once; whether there is anything to wait for."""
        if self.disk.is_stalled:
            table.was_read = True
        if table.was_read:
            return False
        self._without_room.pop(seq_id, None)
        count, names, checkpoint = self._matcher.on_disk(self.disk, table, token_ids, match)
        if count <= match.count:
            table.was_read = True
            return False
        wanted = [(Kind.PAGE, name) for name in names]
        wanted += [(Kind.CHECKPOINT, checkpoint)] if checkpoint is not None else []
        known = (self._pool.find(name) for name in self._matcher.needed(table.names, count))
        held = [page_id for page_id in known if page_id is not None and self._pool.is_kept(page_id)]
        awaited = next(filter(self._coming.__contains__, reversed(wanted)), None)
        if awaited is not None:
            self._awaited[seq_id] = awaited
        elif self._has_room(seq_id, len(names) + len(held)):
            self._pool.hold_back(held)
            self._readers[seq_id] = _Reader(table, len(names) + len(held), wanted, held)
            self._coming.update(dict.fromkeys(wanted, seq_id))
            self.disk.read(seq_id, names, checkpoint)
        return True

    def leave(self, seq_id: str) -> None:
        """The sequence has a table, or is gone; one that is not known is ignored."""
        self.disk.cancel(seq_id)
        self._without_room.pop(seq_id, None)
        self._awaited.pop(seq_id, None)
        self._end(seq_id)

    def _take(self, seq_id: str | None) -> None:
        """Take in what has come for a reader; once all has, or nothing more will, it is none any more."""
        reader = self._readers.get(seq_id) if seq_id is not None else None
        if reader is None or seq_id is None:
            return
        for kind, name, payload in self.disk.take(seq_id) if self.disk.is_reading(seq_id) else ():
            self._coming.pop((kind, name), None)
            if kind is Kind.CHECKPOINT:
                self._take_checkpoint(name, payload)
            else:
                self._take_page(name, payload, reader)
        if not self.disk.is_reading(seq_id):
            reader.table.was_read = True
            self._end(seq_id)

    def _end(self, seq_id: str) -> None:
        reader = self._readers.pop(seq_id, None)
        if reader is not None:
            self._num_done += 1
            self._pool.let_go(reader.held)
            for wanted in reader.wanted:
                if self._coming.get(wanted) == seq_id:
                    del self._coming[wanted]

    def _has_room(self, seq_id: str, num_pages: int) -> bool:
        """Whether so many pages are left by those who read; if not, nobody behind the sequence is to begin."""
        num_claimed = sum(reader.num_pages for reader in self._readers.values())
        has_room = num_claimed + num_pages <= self._pool.num_free
        if self._may_begin and has_room:
            return True
        self._without_room[seq_id] = self._num_done if self._may_begin else -1
        self._may_begin = False
        return False

    def _is_worth_a_look(self, seq_id: str) -> bool:
        """Whether there may be room now for a sequence that was told to wait for some."""
        return not self._readers or self._without_room[seq_id] != self._num_done

    @property
    def has_orders(self) -> bool:
        """Whether the runner is to read something out or take something in."""
        return bool(self.disk.has_exports or self.imports or self.checkpoint_imports)

    def take_imports(self) -> tuple[tuple[tuple[int, bytes], ...], tuple[tuple[int, bytes], ...]]:
        """What the runner is to take in: pages and checkpoints."""
        taken = tuple(self.imports.items()), tuple(self.checkpoint_imports.items())
        self.imports.clear()
        self.checkpoint_imports.clear()
        return taken

    def take_exports(self, limit: int) -> tuple[Export, ...]:
        """The next few that the runner is to read out, pages first; what is not in memory any more is left out."""
        return self.disk.take_exports(limit, find=self._find_in_memory)

    def _find_in_memory(self, kind: Kind, name: bytes) -> int | None:
        """Where something is whose bytes can be read; what comes in with the next step cannot leave with it."""
        found, coming = (
            (self._pool.find(name), self.imports)
            if kind is Kind.PAGE
            else (self._checkpoints.find(name), self.checkpoint_imports)
        )
        return None if found in coming else found

    def _take_page(self, name: bytes, payload: bytes, reader: _Reader) -> None:
        page_id = self._pool.find(name)
        if page_id is None and self._pool.num_free:
            (page_id,) = self._pool.allocate(1)
            self._pool.set_name(page_id, name)
            self._pool.release(page_id)
            self._pool.hold_back([page_id])
            reader.held.append(page_id)
            self.imports[page_id] = payload

    def _take_checkpoint(self, name: bytes, payload: bytes) -> None:
        if self._checkpoints.find(name) is None and len(payload) <= self._checkpoints.max_bytes:
            number = self._checkpoints.next_number()
            self._checkpoints.keep(number, [name], size_bytes=len(payload))
            self.checkpoint_imports[number] = payload
