"""What a decode step tells the kernels: arrays whose shapes depend on the number of rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_mlx.core.step import DecodeRow
from vllm_mlx.runner.kernels.plan import PADDED, Integers, num_items, plan_items
from vllm_mlx.runner.layers import PAGE_SIZE

Arrays = dict[str, mx.array]


class PageTables:
    """Every slot's page table on the device, int32 [slots + 1, pages]; the last row belongs to padding.

    Only what was added to a table is sent: a step costs the same at any context.
    """

    def __init__(self, *, num_slots: int, max_pages: int) -> None:
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
            known = self._known[row.slot]
            if row.page_ids is known:
                continue
            start = len(known) if row.page_ids[: len(known)] == known else 0
            added = row.page_ids[start:]
            slots += [row.slot] * len(added)
            columns += range(start, start + len(added))
            page_ids += added
            self._known[row.slot] = row.page_ids
        if page_ids:
            self.array[mx.array(slots), mx.array(columns)] = mx.array(page_ids, dtype=mx.int32)


class DecodePlace:
    """Where the rows of a step stand, as kernels and views want it; made of arrays that may be a compiler's tracers."""

    def __init__(self, arrays: Arrays, table: mx.array, windows: Sequence[int | None]) -> None:
        self.table = table
        self.slots = arrays["slots"]
        self.offset = arrays["positions"]
        """Position of each row's token; 0 for padding."""
        self.writes = arrays["writes"]
        """Where in a head's part of the pool the token goes; a place in page 0 for padding."""
        self.items = {window: arrays[f"items_{i}"] for i, window in enumerate(windows)}
        self.starts = {window: arrays[f"starts_{i}"] for i, window in enumerate(windows)}


class DecodeInputs:
    """Builds the arrays of a step; `windows` are those of the paged layers, each once."""

    def __init__(self, *, windows: Sequence[int | None], kv_heads: int, num_slots: int, max_pages: int) -> None:
        self.windows = tuple(windows)
        self._kv_heads = kv_heads
        self._tables = PageTables(num_slots=num_slots, max_pages=max_pages)

    @property
    def table(self) -> mx.array:
        """Every slot's page table, as of the last call of `arrays`."""
        return self._tables.array

    def place(self, rows: Sequence[DecodeRow]) -> DecodePlace:
        """Where `rows` stand, without padding."""
        return DecodePlace(self.arrays(rows, num_rows=len(rows)), self.table, self.windows)

    def arrays(self, rows: Sequence[DecodeRow], *, num_rows: int) -> Arrays:
        """The arrays for `rows`, padded to `num_rows`."""
        self._tables.update(rows)
        return {name: mx.array(array) for name, array in self.host_arrays(rows, num_rows=num_rows).items()}

    def host_arrays(self, rows: Sequence[DecodeRow], *, num_rows: int) -> dict[str, Integers]:
        """The same, before they are sent to the device."""
        slots = np.full(num_rows, self._tables.padding_slot, np.int32)
        positions = np.full(num_rows, PADDED, np.int32)
        writes = np.zeros(num_rows, np.int32)
        count = len(rows)
        slots[:count] = [row.slot for row in rows]
        positions[:count] = [row.position for row in rows]
        writes[:count] = [
            row.page_ids[row.position // PAGE_SIZE] * PAGE_SIZE + row.position % PAGE_SIZE for row in rows
        ]
        built = {"slots": slots, "positions": np.maximum(0, positions), "writes": writes}
        capacity = num_items(num_rows, kv_heads=self._kv_heads)
        for i, window in enumerate(self.windows):
            plan = plan_items(positions, capacity=capacity, page_size=PAGE_SIZE, window=window)
            built[f"items_{i}"], built[f"starts_{i}"] = plan.items, plan.starts
        return built
