"""The decode step on a GPU: model and sampler as one function, compiled once per number of rows and kind of sampling.

Building the graph of a step takes Python and MLX several milliseconds, often more than a GPU needs to compute it.
Compiled, the graph is kept. A compiled function has fixed shapes: rows are padded to few sizes, page tables stay on the
device, and work items are provided per row, not per token (`decode_inputs`). Padded rows write to page 0 and attend to
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_mlx.core.step import DecodeRow
from vllm_mlx.runner.decode_inputs import DecodePlace
from vllm_mlx.runner.drawing import COMPILED, Drawing, Draws, choose, draws_of
from vllm_mlx.runner.fused_heads import FusedHeads
from vllm_mlx.runner.kernel_pages import KernelPages
from vllm_mlx.runner.layers import ModelLayers
from vllm_mlx.runner.sampler import PADDING

FIRST_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Row counts that are warmed before a server is ready; larger ones are multiples of the last step."""
SIZE_STEP = 32


def row_sizes(max_rows: int) -> tuple[int, ...]:
    """The row counts that steps are padded to, ascending; the last one holds `max_rows`."""
    sizes = (*FIRST_SIZES, *range(FIRST_SIZES[-1] + SIZE_STEP, max_rows + SIZE_STEP, SIZE_STEP))
    return tuple(size for size, before in zip(sizes, (0, *sizes), strict=False) if before < max_rows)


class DecodeStep:
    """Computes the decode steps of a model whose layers are all in pages."""

    def __init__(
        self,
        model: nn.Module,
        layers: ModelLayers,
        pages: KernelPages,
        *,
        max_rows: int,
        fused: FusedHeads | None = None,
    ) -> None:
        self._model = model
        self._fused = fused or FusedHeads()
        self._layers = layers
        self._pages = pages
        self._inputs = pages.inputs
        self._order = pages.order
        self._sizes = row_sizes(max_rows)
        self._functions: dict[Drawing | None, Callable[..., Any]] = {}
        self._cold = list(self._shapes())

    def size(self, num_rows: int) -> int:
        """How many rows a step of `num_rows` is padded to."""
        return next(size for size in self._sizes if size >= num_rows)

    def logits(self, rows: Sequence[DecodeRow], last_tokens: mx.array) -> mx.array:
        """Logits [rows, vocab]. Rows may name their tokens, and a slot may have several: no token is sampled here."""
        return self._padded_logits(rows, last_tokens, num_rows=self.size(len(rows)))[: len(rows)]

    def tokens(
        self, rows: Sequence[DecodeRow], last_tokens: mx.array, *, drawing: Drawing, draws: Draws
    ) -> tuple[mx.array, mx.array]:
        """The next tokens int32 [size], and `last_tokens` with them in their slots; `draws` are padded to the size.

        A slot has one row, whose token is its last one.
        """
        packed = self._inputs.packed(rows, num_rows=draws["seeds"].size)
        tokens, last_tokens, self._order.token = self._function(drawing)(
            packed, self._inputs.tables, last_tokens, self._order.token, draws
        )
        return tokens, last_tokens

    @property
    def num_urgent(self) -> int:
        """How many of the shapes not compiled yet should be warmed before anybody is served."""
        return sum(size <= FIRST_SIZES[-1] and drawing is not None for size, drawing in self._cold)

    def warm_one(self, last_tokens: mx.array) -> bool:
        """Compile the next shape and run it on padding alone; False if none is left.

        Raises:
            RuntimeError, ValueError: it does not compile, or memory is short; nothing has changed.
        """
        if not self._cold:
            return False
        (size, drawing), token = self._cold.pop(0), self._order.token
        try:
            if drawing is None:
                result = self._padded_logits((), last_tokens, num_rows=size)
            else:
                draws = draws_of([PADDING] * size, [0] * size)
                result, _ = self.tokens((), last_tokens, drawing=drawing, draws=draws)
            mx.eval(result, self._order.token)
        except (RuntimeError, ValueError):
            self._order.token = token  # the new one may never be there
            raise
        return True

    def close(self) -> None:
        """Drop the compiled functions. They and this object hold each other, and with them the model and its pools."""
        self._functions.clear()
        self._cold.clear()

    def _padded_logits(self, rows: Sequence[DecodeRow], last_tokens: mx.array, *, num_rows: int) -> mx.array:
        """Logits [num_rows, vocab]."""
        packed = self._inputs.packed(rows, num_rows=num_rows)
        logits: mx.array
        logits, self._order.token = self._function(None)(packed, self._inputs.tables, last_tokens, self._order.token)
        return logits

    def _shapes(self) -> Iterator[tuple[int, Drawing | None]]:
        """All shapes, those first that are met first; without a drawing the step ends at the logits."""
        first = [size for size in self._sizes if size <= FIRST_SIZES[-1]]
        for sizes in (first, self._sizes[len(first) :]):
            yield from ((size, drawing) for drawing in (*COMPILED, None) for size in sizes)

    def _function(self, drawing: Drawing | None) -> Callable[..., Any]:
        if drawing not in self._functions:
            self._functions[drawing] = mx.compile(self._forward(drawing))
        return self._functions[drawing]

    def _forward(self, drawing: Drawing | None) -> Callable[..., Any]:
        """The step as a function of arrays. Weights and pools are its constants: no step replaces them."""

        def forward(
            packed: mx.array, tables: list[mx.array], last_tokens: mx.array, token: mx.array, draws: Draws | None = None
        ) -> tuple[mx.array, ...]:
            arrays = self._inputs.unpacked(packed)
            place, tokens = DecodePlace(arrays, tables, self._inputs.windows), last_tokens[arrays["slots"]]
            if drawing is None:  # rows may name theirs
                tokens = mx.where(arrays["known"] < 0, tokens, arrays["known"])
            with self._order.starting_at(token):
                views = self._pages.views(place)
                with self._fused.reading(views):
                    logits = self._model(tokens[:, None], cache=self._layers.fold(list(views)))[:, -1]
                after = self._order.token
            if drawing is None or draws is None:
                return logits, after
            keys = mx.stack([draws["seeds"], (place.offset + 1).astype(mx.uint32)], axis=-1)
            tokens = choose(drawing, logits.astype(mx.float32), draws, keys=keys)
            last_tokens[place.slots] = tokens
            return tokens, last_tokens, after

        return forward
