"""Short prompts on a GPU: several whole ones in one forward pass, compiled once per shape.

A prompt of a hundred tokens costs a GPU a millisecond or two, and MLX many times that to build and launch. So prompts
that begin at their first token are put side by side, padded on the right to few lengths, and computed by a function
that keeps its graph. Padding comes after all that a row has, so attention, which is causal, never sees it; its keys
and values go to page 0. That holds for models whose layers are all in pages, and for no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_mlx.core.step import PrefillRow
from vllm_mlx.runner import suffixes
from vllm_mlx.runner.geometry import PaddedChunks, SinglePlace
from vllm_mlx.runner.head import WantedPositions
from vllm_mlx.runner.kernel_pages import KernelPages, KernelPool
from vllm_mlx.runner.layers import ModelLayers, narrower
from vllm_mlx.runner.lone_chunks import LoneChunks

LENGTHS = (32, 64, 96, 128, 160, 192, 256, 384, 512)
GROUP_SIZES = (8, 4, 1)
MAX_TOKENS_TOGETHER = 1536
"""Beyond that, a GPU is busy with fewer prompts as it is."""


class PromptView:
    """A paged layer's cache while whole prompts are computed, padded to one length."""

    def __init__(self, pool: KernelPool, place: SinglePlace, slots: Sequence[mx.array]) -> None:
        self._pool = pool
        self._place = place
        self._slots = slots
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, tokens, dim]; a prompt looks at nothing but itself."""
        self._pool.write_slots(self._slots[self._pool.group], keys, values)
        return keys, values

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of mlx-lm's caches: None, 'causal' or a boolean [tokens, tokens]."""
        return self._place.mask(narrower(self._pool.window, window_size), begin=0, as_array=return_array)


class PrefillStep:
    """Computes prompts of a model whose layers are all in pages that are not quantised.

    Whole short ones and chunks that are better computed together; others too, if it has a way of its own for lone ones.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: ModelLayers,
        pages: KernelPages,
        *,
        wanted: WantedPositions,
        lone: LoneChunks | None = None,
    ) -> None:
        self._model = model
        self._layers = layers
        self._pages = pages
        self._wanted = wanted
        self._lone = lone
        self._function: Any = mx.compile(self._forward)
        self._cold = [(rows, length) for rows in GROUP_SIZES[::-1] for length in LENGTHS if _fits(rows, length)]

    @staticmethod
    def takes(row: PrefillRow) -> bool:
        """Whether a chunk is a whole short prompt."""
        return row.start == 0 and row.samples and len(row.token_ids) <= LENGTHS[-1]

    def logits(self, rows: Sequence[PrefillRow]) -> Iterator[tuple[tuple[PrefillRow, ...], mx.array]]:
        """Those rows that it computes, in groups, and the logits [rows, vocab] behind each group."""
        together = suffixes.groups(rows)
        for group in together:
            yield group, suffixes.logits(self._model, self._layers, self._pages, self._wanted, group)
        yield from self._lone_logits(rows, {row.slot for group in together for row in group})
        ordered = sorted((row for row in rows if self.takes(row)), key=lambda row: len(row.token_ids))
        while ordered:
            num_rows = _group_size(ordered)
            group, ordered = tuple(ordered[:num_rows]), ordered[num_rows:]
            yield group, self._run(group, num_rows=num_rows)[: len(group)]

    def warm_one(self) -> bool:
        """Compile the next shape and run it on padding alone; False if none is left.

        Raises:
            RuntimeError, ValueError: it does not compile, or memory is short; nothing has changed.
        """
        if not self._cold:
            return False
        (num_rows, length), token = self._cold.pop(0), self._pages.order.token
        try:
            mx.eval(self._run((), num_rows=num_rows, length=length), self._pages.order.token)
        except (RuntimeError, ValueError):
            self._pages.order.token = token  # the new one may never be there
            raise
        return True

    def plan_one(self) -> bool:
        """Have the attention of the next shape of long prompts planned; False if none is left.

        Raises:
            RuntimeError, ValueError: memory is short; nothing has changed, and no more will be planned.
        """
        return self._lone is not None and self._lone.plan_one()

    @property
    def num_cold(self) -> int:
        """Shapes not compiled yet."""
        return len(self._cold)

    def close(self) -> None:
        """Drop the compiled function, which holds the model and its pools."""
        self._function = self._lone = None
        self._cold.clear()

    def _lone_logits(
        self, rows: Sequence[PrefillRow], taken: set[int]
    ) -> Iterator[tuple[tuple[PrefillRow, ...], mx.array]]:
        """Those that nobody takes, whose slots are not in `taken`, one by one."""
        if self._lone is None:
            return
        for row in rows:
            if row.slot not in taken and not self.takes(row) and self._lone.takes(row):
                yield (row,), self._lone.logits(row)

    def _run(self, rows: Sequence[PrefillRow], *, num_rows: int, length: int = 0) -> mx.array:
        """Logits [padded rows, vocab]."""
        length = length or max(_padded(row) for row in rows)
        pages = self._pages
        chunks = PaddedChunks(rows, num_rows=num_rows, length=length, num_groups=pages.num_groups, send=pages.send)
        logits: mx.array
        logits, pages.order.token = self._function(chunks.token_ids, chunks.slots, chunks.lasts, pages.order.token)
        return logits

    def _forward(
        self, token_ids: mx.array, slots: tuple[mx.array, ...], lasts: mx.array, token: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The pass as a function of arrays; weights and pools are its constants."""
        place = SinglePlace(0, token_ids.shape[1], ())
        with self._pages.order.starting_at(token), self._wanted.at(lasts):
            views = self._layers.fold([PromptView(pool, place, slots) for pool in self._pages.pools])
            logits = self._wanted.of(self._model(token_ids, cache=views))[:, 0]
            return logits, self._pages.order.token


def _padded(row: PrefillRow) -> int:
    return next(length for length in LENGTHS if length >= len(row.token_ids))


def _group_size(ordered: Sequence[PrefillRow]) -> int:
    """The largest that fits and is worth its padding: a smaller one would not take all rows."""
    smaller = dict(zip(GROUP_SIZES, (*GROUP_SIZES[1:], 0), strict=True))
    return next(n for n in GROUP_SIZES if len(ordered) > smaller[n] and _fits(n, _padded(ordered[:n][-1])))


def _fits(num_rows: int, length: int) -> bool:
    return num_rows == 1 or num_rows * length <= MAX_TOKENS_TOGETHER
