"""What a decode step tells the kernels: arrays whose shapes depend on the number of rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import mlx.core as mx
import numpy as np

from vllm_mlx.core.step import DecodeRow
from vllm_mlx.runner.kernels.plan import PADDED, Integers, num_items, plan_items
from vllm_mlx.runner.layers import PAGE_SIZE
from vllm_mlx.runner.staging import Send

Arrays = dict[str, mx.array]

PACKED_MULTIPLE = 32
"""Each array begins at a multiple of so many numbers: kernels may read several at a time."""
_ZEROS = np.zeros(PACKED_MULTIPLE, np.int32)


class PageTables:
    """Every slot's page table of a group on the device, int32 [slots + 1, pages]; the last row belongs to padding.

    Only what was added to a table is sent: a step costs the same at any context. Pages that the group's window does not
    show any more stay as they are, and nobody reads them.
    """

    def __init__(
        self, group: int, *, window: int | None, num_slots: int, max_pages: int, send: Send = mx.array
    ) -> None:
        self._group = group
        self._window = window
        self._send = send
        self.array = mx.zeros((num_slots + 1, max(1, max_pages)), mx.int32)
        self._known: list[tuple[int, ...]] = [()] * num_slots

    @property
    def padding_slot(self) -> int:
        """The slot of rows that are there for the shape's sake."""
        return len(self._known)

    def update(self, rows: Sequence[DecodeRow]) -> None:
        """Take in tables that changed."""
        slots: list[int] = []
        columns: list[int] = []
        page_ids: list[int] = []
        for row in rows:
            known, table = self._known[row.slot], self._table_of(row)
            if table is known:
                continue
            first = 0 if self._window is None else max(0, row.position - self._window + 1) // PAGE_SIZE
            start = max(first, len(known)) if table[first : len(known)] == known[first:] else first
            added = table[start:]
            slots += [row.slot] * len(added)
            columns += range(start, start + len(added))
            page_ids += added
            self._known[row.slot] = table
        if page_ids:
            at, column, page_id = self._send(np.array([slots, columns, page_ids], np.int32))
            self.array[at, column] = page_id

    def writes(self, rows: Sequence[DecodeRow]) -> list[int]:
        """Where in a head's part of the pool the rows' tokens go."""
        at = [(self._table_of(row), row.position) for row in rows]
        return [table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for table, position in at]

    def _table_of(self, row: DecodeRow) -> tuple[int, ...]:
        return row.other_page_ids[self._group - 1] if self._group else row.page_ids


def known_tokens(rows: Sequence[DecodeRow], *, num_rows: int) -> Integers:
    """Tokens of rows that name theirs, int32 [num_rows]; -1 for those that do not, and for padding."""
    tokens = np.full(num_rows, -1, np.int32)
    tokens[: len(rows)] = [-1 if row.token_id is None else row.token_id for row in rows]
    return tokens


def input_tokens(rows: Sequence[DecodeRow], last_tokens: mx.array) -> mx.array:
    """What the rows compute, int32 [rows]: the tokens that they name, or their slots' last ones."""
    last = last_tokens[mx.array([row.slot for row in rows])]
    if all(row.token_id is None for row in rows):
        return last
    known = mx.array(known_tokens(rows, num_rows=len(rows)))
    return mx.where(known < 0, last, known)


class DecodePlace:
    """Where the rows of a step stand, as kernels and views want it; made of arrays that may be a compiler's tracers."""

    def __init__(self, arrays: Arrays, tables: Sequence[mx.array], windows: Sequence[int | None]) -> None:
        self.tables = tables
        """Of each group of layers."""
        self.slots = arrays["slots"]
        self.offset = arrays["positions"]
        """Position of each row's token; 0 for padding."""
        self.writes = [arrays[f"writes_{group}"] for group in range(len(tables))]
        """Of each group, where in a head's part of the pool the token goes; a place in page 0 for padding."""
        self.items = {window: arrays[f"items_{i}"] for i, window in enumerate(windows)}
        self.starts = {window: arrays[f"starts_{i}"] for i, window in enumerate(windows)}


class DecodeInputs:
    """Builds the arrays of a step; `windows` are those of the paged layers, each once.

    `group_windows` are those of the groups of layers with tables of their own.
    """

    def __init__(
        self,
        *,
        windows: Sequence[int | None],
        group_windows: Sequence[int | None] = (None,),
        kv_heads: int,
        num_slots: int,
        max_pages: int,
        send: Send = mx.array,
    ) -> None:
        self._send = send
        self.windows = tuple(windows)
        self._kv_heads = kv_heads
        self._layouts: dict[int, list[tuple[str, int, tuple[int, ...]]]] = {}
        """By the length of what is sent for so many rows: name, start and shape of each array in it."""
        self._tables = [
            PageTables(group, window=window, num_slots=num_slots, max_pages=max_pages, send=send)
            for group, window in enumerate(group_windows)
        ]

    @property
    def num_groups(self) -> int:
        """Groups of layers."""
        return len(self._tables)

    @property
    def tables(self) -> list[mx.array]:
        """Every slot's page table in each group, as of the last call of `packed`."""
        return [table.array for table in self._tables]

    def place(self, rows: Sequence[DecodeRow]) -> DecodePlace:
        """Where `rows` stand, without padding."""
        return DecodePlace(self.unpacked(self.packed(rows, num_rows=len(rows))), self.tables, self.windows)

    def packed(self, rows: Sequence[DecodeRow], *, num_rows: int) -> mx.array:
        """The arrays for `rows`, padded to `num_rows`, one after the other, int32 [n]; another n for each `num_rows`.

        Each array that is sent by itself takes a host about as long as making it did.
        """
        for table in self._tables:
            table.update(rows)
        layout: list[tuple[str, int, tuple[int, ...]]] = []
        parts, size = [], 0
        for name, array in self.host_arrays(rows, num_rows=num_rows).items():
            layout.append((name, size, array.shape))
            padding = -array.size % PACKED_MULTIPLE
            parts += [array.reshape(-1), _ZEROS[:padding]]
            size += array.size + padding
        size += num_rows  # the rest grows by steps
        self._layouts[size] = layout
        return self._send(np.concatenate([*parts, np.zeros(num_rows, np.int32)]))

    def unpacked(self, packed: mx.array) -> Arrays:
        """The arrays in what `packed` gave, which may be a compiler's tracer."""
        layout = self._layouts[packed.size]
        return {name: packed[start : start + prod(shape)].reshape(shape) for name, start, shape in layout}

    def host_arrays(self, rows: Sequence[DecodeRow], *, num_rows: int) -> dict[str, Integers]:
        """The arrays for `rows`, padded to `num_rows`."""
        slots = np.full(num_rows, self._tables[0].padding_slot, np.int32)
        positions = np.full(num_rows, PADDED, np.int32)
        count = len(rows)
        slots[:count] = [row.slot for row in rows]
        positions[:count] = [row.position for row in rows]
        built = {"slots": slots, "positions": np.maximum(0, positions)}
        built["known"] = known_tokens(rows, num_rows=num_rows)
        for group, table in enumerate(self._tables):
            writes = built[f"writes_{group}"] = np.zeros(num_rows, np.int32)
            writes[:count] = table.writes(rows)
        capacity = num_items(num_rows, kv_heads=self._kv_heads)
        for i, window in enumerate(self.windows):
            plan = plan_items(positions, capacity=capacity, page_size=PAGE_SIZE, window=window)
            built[f"items_{i}"], built[f"starts_{i}"] = plan.items, plan.starts
        return built
