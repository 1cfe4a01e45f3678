"""Chunks that are computed alone where MLX's attention plans every shape anew (CUDA): they are given few shapes.

A plan takes 60 to 90 ms, and is kept by the shapes and strides of all that attention is given. A chunk of the
scheduler's own size behind as many such chunks as you like is what every long prompt begins with: it keeps its shape
and the causal mask that attention knows by name. Of all others, the tokens and the keys are padded to few lengths, and
an array hides what is not to be seen. Padding comes last and is written to page 0. Layers with a window read little
more than what it shows. Plans are made in idle time, for full chunks and for short ones. That holds for models whose
layers are all in pages that are not quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_mlx.core.step import PrefillRow
from vllm_mlx.runner.geometry import PaddedChunks, additive
from vllm_mlx.runner.head import WantedPositions
from vllm_mlx.runner.kernel_pages import KernelPages, KernelPool
from vllm_mlx.runner.layers import PAGE_SIZE, LayerShape, ModelLayers, narrower
from vllm_mlx.runner.shared_prefix import padded_keys
from vllm_mlx.runner.staging import Send

SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens of a padded chunk; beyond the last, multiples of it."""
MAX_SCORES = 1 << 26
"""Elements of a padded chunk's mask. Where there would be more, attention with an array takes longer than with the
causal mask by as much as a plan costs."""
MAX_PLANNED_DIM = 128
"""Larger heads are not computed by cuDNN, and nothing is planned for them."""
KEYS_STEPS = 4
"""Keys are padded to one of so many lengths from a power of two to the next."""
MAX_PLANNED_CHUNK = 4096
"""Larger full chunks are planned when they come: a plan costs them little, and whoever comes while one is planned in
advance would wait for all of it."""
MAX_PLANNED_START = 32768
MAX_PLANNED_FULL = 16
MAX_PLANNED_SIZE = 512
"""What is planned in advance: full chunks behind so many tokens, or so many full ones, and padded ones of such a size
with so many keys. They are fewer than the 256 plans that MLX keeps."""


class Shape(NamedTuple):
    """All that plans of a chunk depend on."""

    start: int
    size: int
    pads_keys: bool


class LoneChunk:
    """Where a chunk's `size` tokens stand, padding included, and what they look at.

    With `pads_keys` the keys that a layer gets are what its pages hold, then padding; without, they end with the chunk,
    which must then end with a page.
    """

    def __init__(self, row: PrefillRow, *, size: int, pads_keys: bool, send: Send = mx.array) -> None:
        assert pads_keys or (row.start + size) % PAGE_SIZE == 0
        self.chunks = PaddedChunks([row], num_rows=1, length=size, num_groups=len(row.tables), send=send)
        self.offset = row.start
        self._row, self._size, self._pads_keys, self._send = row, size, pads_keys, send
        self._tables: dict[tuple[int, int | None], mx.array] = {}
        self._masks: dict[tuple[int | None, int | None, mx.Dtype], mx.array] = {}

    def keys(self, window: int | None) -> tuple[int, int]:
        """The first page that a layer with this window reads, and how many keys it gets."""
        first = 0 if window is None else max(0, self.offset - window + 1) // PAGE_SIZE
        end = self.offset + self._size
        if not self._pads_keys:
            return first, end - first * PAGE_SIZE
        # Wherever in a page the window begins, it is one shape.
        return first, padded_keys(
            end if window is None else min(end, self._size + window + PAGE_SIZE), steps=KEYS_STEPS
        )

    def table(self, group: int, window: int | None) -> mx.array:
        """The pages that these keys lie in, int32 [1, pages]; those that are only padding are page 0."""
        if (group, window) not in self._tables:
            first, num_keys = self.keys(window)
            table = np.zeros((1, num_keys // PAGE_SIZE), np.int32)
            own = self._row.tables[group][first : first + table.shape[1]]
            table[0, : len(own)] = own
            self._tables[group, window] = self._send(table)
        return self._tables[group, window]

    def mask(self, window: int | None, *, read: int | None, dtype: mx.Dtype) -> mx.array | str:
        """'causal', or what is added to the scores, [tokens, keys], for a layer that reads by the window `read`."""
        if window is not None and self.offset + self._size <= window:
            window = None
        if window is None and not self._pads_keys:
            return "causal"
        if (window, read, dtype) not in self._masks:
            first, num_keys = self.keys(read)
            queries = self.offset + mx.arange(self._size)[:, None]
            keys = first * PAGE_SIZE + mx.arange(num_keys)
            seen = keys <= queries
            seen = seen if window is None else seen & (keys > queries - window)
            self._masks[window, read, dtype] = additive(seen, dtype)
        return self._masks[window, read, dtype]


class LoneChunkView:
    """A paged layer's cache while such a chunk is computed."""

    def __init__(self, pool: KernelPool, place: LoneChunk) -> None:
        self._pool = pool
        self._place = place
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [1, heads, tokens, dim]; returns [1, heads, keys, dim], contiguous: plans are kept by strides, too."""
        pool, place = self._pool, self._place
        pool.write_slots(place.chunks.slots[pool.group], keys, values)
        return pool.read_rows(place.table(pool.group, pool.window))

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """See LoneChunk. Models that ask for arrays of another kind are not served through pages on a GPU."""
        assert not return_array
        pool = self._pool
        return self._place.mask(narrower(pool.window, window_size), read=pool.window, dtype=pool.dtype)


class LoneChunks:
    """Computes them, and plans in advance. `chunk_size` is the scheduler's, `max_tokens` a sequence's most."""

    def __init__(
        self,
        model: nn.Module,
        layers: ModelLayers,
        pages: KernelPages,
        *,
        wanted: WantedPositions,
        chunk_size: int,
        max_tokens: int,
    ) -> None:
        self._model = model
        self._layers = layers
        self._pages = pages
        self._wanted = wanted
        self._full = chunk_size // PAGE_SIZE * PAGE_SIZE
        """Of a chunk that does not end its prompt: it goes up to a page boundary."""
        self._max_tokens = max_tokens
        self._unplanned = [shape for shape in _first_shapes(self._full) if shape.start + shape.size <= max_tokens]

    def takes(self, row: PrefillRow) -> bool:
        """Whether the chunk is better off with another shape, or has one that comes again.

        A lone token is decoded, which needs no plan. Padding must not go beyond the positions that the model knows.
        """
        fits = row.start + padded_tokens(len(row.token_ids)) <= self._max_tokens and num_scores(row) <= MAX_SCORES
        return self._is_full(row) or (len(row.token_ids) > 1 and fits)

    def logits(self, row: PrefillRow) -> mx.array:
        """Logits [1, vocab] behind its last token."""
        is_full = self._is_full(row)
        size = self._full if is_full else padded_tokens(len(row.token_ids))
        return self._logits_at(LoneChunk(row, size=size, pads_keys=not is_full, send=self._pages.send))

    def _logits_at(self, place: LoneChunk) -> mx.array:
        with self._wanted.at(place.chunks.lasts):
            views = self._layers.fold([LoneChunkView(pool, place) for pool in self._pages.pools])
            return self._wanted.of(self._model(place.chunks.token_ids, cache=views))[:, 0]

    def plan_one(self) -> bool:
        """Run the next shape on padding alone, all of it in page 0, which plans it; False if none is left.

        Raises:
            RuntimeError, ValueError: memory is short; nothing has changed, and no more will be planned.
        """
        if not self._unplanned:
            return False
        (start, size, pads_keys), token = self._unplanned.pop(0), self._pages.order.token
        pages = (0,) * ((start + size) // PAGE_SIZE)
        row = PrefillRow(0, start, (0,) * size, pages, False, (pages,) * (self._pages.num_groups - 1))
        try:
            self._logits_at(LoneChunk(row, size=size, pads_keys=pads_keys, send=self._pages.send))
            mx.eval(self._pages.order.token)
        except (RuntimeError, ValueError):
            self._pages.order.token = token  # the new one may never be there
            self._unplanned.clear()
            raise
        return True

    def _is_full(self, row: PrefillRow) -> bool:
        return len(row.token_ids) == self._full and row.start % self._full == 0


def are_planned(shapes: Sequence[LayerShape]) -> bool:
    """Whether any of a model's layers in pages has attention that is planned, where the backend plans at all."""
    return any(max(shape.key_dim, shape.value_dim) <= MAX_PLANNED_DIM for shape in shapes)


def padded_tokens(count: int) -> int:
    """Tokens of a chunk, padded."""
    return next((size for size in SIZES if size >= count), -(-count // SIZES[-1]) * SIZES[-1])


def num_scores(row: PrefillRow) -> int:
    """Elements of its mask, if it is padded."""
    size = padded_tokens(len(row.token_ids))
    return size * padded_keys(row.start + size, steps=KEYS_STEPS)


def _first_shapes(full: int) -> Iterator[Shape]:
    """Those that are planned in advance; first of all long prompts' `full` chunks."""
    last = min(MAX_PLANNED_START, MAX_PLANNED_FULL * full)
    for start in range(0, last + 1, full) if 0 < full <= MAX_PLANNED_CHUNK else ():
        yield Shape(start, full, pads_keys=False)
    num_keys = 0
    while (num_keys := padded_keys(num_keys + 1, steps=KEYS_STEPS)) <= MAX_PLANNED_START:
        for size in SIZES:
            if size <= min(num_keys, MAX_PLANNED_SIZE):
                yield Shape(num_keys - size, size, pads_keys=True)
