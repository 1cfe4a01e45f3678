"""How the tokens of a batch are cut into items, so that long and short rows fill the device alike.

Plain arithmetic on the host, from lengths alone. The number of items is fixed per number of rows, so that the step's
shapes do not depend on the contexts; what varies is how many tokens an item has.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int32]

MIN_SPAN = 256
"""Tokens of the smallest item: below that, joining costs more than it brings."""
TARGET_BLOCKS = 256
"""Blocks of eight warps that a large GPU has room for at once; a smaller one takes a few rounds."""
PADDED = -1
"""Position of rows that are there for the shape's sake."""


class DecodePlan(msgspec.Struct, frozen=True, eq=False):
    """What the kernels are told of a batch."""

    items: Integers
    """[num_items, 4]: row (-1 where unused), first token, token after the last, position of the first query."""
    starts: Integers
    """[rows + 1]: the items of row i are starts[i] .. starts[i + 1] - 1."""


def num_items(rows: int, *, kv_heads: int) -> int:
    """Items provided for a batch of `rows` rows."""
    return rows + -(-TARGET_BLOCKS // kv_heads)


def plan_items(
    positions: Integers, *, capacity: int, page_size: int, num_queries: int = 1, window: int | None = None
) -> DecodePlan:
    """Cut rows whose first queries stand at `positions` into at most `capacity` items; capacity > rows.

    A row at `PADDED` gets no item.
    """
    ends = np.where(positions < 0, 0, positions + num_queries).astype(np.int32)
    begins = np.zeros_like(ends)
    if window is not None:
        begins = np.maximum(0, positions + 1 - window) // page_size * page_size
    lengths = np.maximum(0, ends - begins)
    span = _span(lengths, capacity=capacity, page_size=page_size)
    counts = -(-lengths // span)
    starts = np.zeros(len(positions) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    used = int(starts[-1])
    rows = np.repeat(np.arange(len(positions), dtype=np.int32), counts)
    items = np.full((capacity, 4), -1, np.int32)
    items[:used, 0] = rows
    first = begins[rows] + (np.arange(used, dtype=np.int32) - starts[rows]) * span
    items[:used, 1] = first
    items[:used, 2] = np.minimum(first + span, ends[rows])
    items[:used, 3] = positions[rows]
    return DecodePlan(items, starts)


def _span(lengths: Integers, *, capacity: int, page_size: int) -> int:
    """Tokens per item, a multiple of the page: the fewest for which all rows fit in `capacity` items."""
    spare = max(1, capacity - len(lengths))  # each row's last item may be partly filled
    least = max(MIN_SPAN, -(-int(lengths.sum()) // spare))
    return -(-least // page_size) * page_size
