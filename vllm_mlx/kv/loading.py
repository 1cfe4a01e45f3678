"""Prefixes that are on disk: loaded ahead while their sequence waits, then remembered as if they had been computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_mlx.kv.blocks import PagePool
from vllm_mlx.kv.checkpoints import Checkpoints
from vllm_mlx.kv.disk import DiskCache, Export
from vllm_mlx.kv.matching import Match, Matcher
from vllm_mlx.kv.tables import Table
from vllm_mlx.kv.tiers.record import Kind


class Loader:
    """Moves pages and checkpoints between the disk and memory; what the runner must do for it is collected."""

    def __init__(self, disk: DiskCache, matcher: Matcher, pool: PagePool, checkpoints: Checkpoints) -> None:
        self.disk = disk
        self._matcher = matcher
        self._pool = pool
        self._checkpoints = checkpoints
        self.imports: dict[int, bytes] = {}
        """Payloads by page id, for the next step. A page that changed hands since comes in once, with the last."""
        self.checkpoint_imports: dict[int, bytes] = {}

    def is_done(self, seq_id: str, table: Table, token_ids: Sequence[int], match: Match) -> bool:
        """Load what the disk has of a waiting sequence beyond `match`; True once there is nothing to wait for."""
        if table.was_read:
            return True
        if not self.disk.is_reading(seq_id):
            if self.disk.is_stalled:
                table.was_read = True
                return True
            count, names, checkpoint = self._matcher.on_disk(self.disk, table, token_ids, match)
            table.was_read = count <= match.count
            if not table.was_read:
                self._spare(self._matcher.needed(table.names, count))
                self.disk.read(seq_id, names, checkpoint)
            return table.was_read
        for kind, name, payload in self.disk.take(seq_id):
            if kind is Kind.CHECKPOINT:
                self._take_checkpoint(name, payload)
            else:
                self._take_page(name, payload)
        table.was_read = not self.disk.is_reading(seq_id)
        return table.was_read

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

    def _spare(self, names: Iterable[bytes]) -> None:
        """What is loaded must not take the place of the pages before it: they count as used now, the first last."""
        for name in reversed(tuple(names)):
            page_id = self._pool.find(name)
            if page_id is not None:
                self._pool.touch(page_id)

    def _take_page(self, name: bytes, payload: bytes) -> None:
        if self._pool.find(name) is None and self._pool.num_free:
            (page_id,) = self._pool.allocate(1)
            self._pool.set_name(page_id, name)
            self._pool.release(page_id)
            self.imports[page_id] = payload

    def _take_checkpoint(self, name: bytes, payload: bytes) -> None:
        if self._checkpoints.find(name) is None and len(payload) <= self._checkpoints.max_bytes:
            number = self._checkpoints.next_number()
            self._checkpoints.keep(number, [name], size_bytes=len(payload))
            self.checkpoint_imports[number] = payload
