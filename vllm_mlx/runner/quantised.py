"""Quantised layers that choose how many matrices a batch is.

A decode step's activations are `[rows, 1, K]`. MLX's CUDA build multiplies them with a quantised weight as that many
matrix-vector products, each of which reads and unpacks the whole weight; as one matrix `[rows, K]` they cost little
more than one row. The modules below stand in place of `nn.QuantizedLinear` and `nn.QuantizedEmbedding`, share their
arrays, and fold rows, or repeat a few rows up to a full tile, where a measurement on this device found that faster.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from vllm_mlx.runner.head import EMBEDDING_NAMES

PADDED_ROWS = 16
"""Rows of the smallest tile of MLX's quantised matrix kernels on CUDA."""


class Way(enum.Enum):
    """How activations `[..., tokens, K]` meet a quantised weight."""

    STRAIGHT = "straight"
    """As they come: one matrix per leading index."""
    FOLD = "fold"
    """As one matrix `[rows, K]`."""
    PAD = "pad"
    """As one matrix, with its rows repeated up to `PADDED_ROWS`."""


@dataclass(frozen=True, slots=True, order=True)
class WeightKind:
    """Quantised weights that MLX multiplies alike."""

    out_dims: int
    in_dims: int
    bits: int
    group_size: int
    mode: str

    @classmethod
    def of(cls, module: nn.Module) -> WeightKind:
        """The kind of a quantised linear layer or embedding."""
        out_dims, packed = module.weight.shape
        return cls(out_dims, packed * 32 // module.bits, module.bits, module.group_size, module.mode)

    def __str__(self) -> str:
        return f"{self.out_dims} x {self.in_dims}, {self.bits} bit {self.mode}"


@dataclass(frozen=True, slots=True)
class FoldRule:
    """Which way is taken for how many rows."""

    ranges: tuple[tuple[int, Way], ...] = ()
    """(first row count, way), ascending; below the first one the way is straight."""

    def way(self, rows: int) -> Way:
        """The way for this many rows."""
        for first, way in reversed(self.ranges):
            if rows >= first:
                return way
        return Way.STRAIGHT

    @property
    def is_plain(self) -> bool:
        """Whether it never changes what the library does."""
        return all(way is Way.STRAIGHT for _, way in self.ranges)


PLAIN = FoldRule()
ALWAYS_FOLD = FoldRule(((1, Way.FOLD),))


@dataclass(frozen=True, slots=True)
class FoldPolicy:
    """A rule for every kind of weight of a model."""

    rules: tuple[tuple[WeightKind, FoldRule], ...] = ()
    default: FoldRule = PLAIN
    """For kinds that `rules` does not name."""

    def rule(self, kind: WeightKind) -> FoldRule:
        """The rule for weights of this kind."""
        return next((rule for named, rule in self.rules if named == kind), self.default)


def multiply(matmul: Callable[[mx.array], mx.array], x: mx.array, *, way: Way) -> mx.array:
    """`matmul` of activations `[..., K]`, shaped `[..., N]`; where `way` changes nothing, no operation is added."""
    dims = x.shape[-1]
    rows = x.size // dims
    is_padded = way is Way.PAD and rows < PADDED_ROWS
    is_matrix = x.ndim < 3 or x.shape[-2] == rows
    if way is Way.STRAIGHT or (is_matrix and not is_padded):
        return matmul(x)
    matrix = x.reshape(rows, dims)
    out = matmul(_repeated(matrix))[:rows] if is_padded else matmul(matrix)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _repeated(matrix: mx.array) -> mx.array:
    """`PADDED_ROWS` rows, the given ones over and over: one copy, where padding with zeros is a fill and a copy."""
    rows, dims = matrix.shape
    copies = -(-PADDED_ROWS // rows)
    stacked = mx.contiguous(mx.broadcast_to(matrix[None], (copies, rows, dims)))
    return stacked.reshape(copies * rows, dims)[:PADDED_ROWS]


class FoldedLinear(nn.QuantizedLinear):  # type: ignore[misc]
    """A quantised linear layer with a `FoldRule`."""

    rule: FoldRule

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs `[..., out_dims]` of activations `[..., in_dims]`."""
        if (way := self.rule.way(x.size // x.shape[-1])) is Way.STRAIGHT:
            result: mx.array = super().__call__(x)
            return result
        return multiply(super().__call__, x, way=way)  # with the bias, if there is one


class FoldedEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]
    """A quantised embedding with a `FoldRule` for its use as output projection."""

    rule: FoldRule

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits `[..., vocab]` of hidden states `[..., dim]`."""
        if (way := self.rule.way(x.size // x.shape[-1])) is Way.STRAIGHT:
            result: mx.array = super().as_linear(x)
            return result
        return multiply(super().as_linear, x, way=way)


FOLDED = {nn.QuantizedLinear: FoldedLinear, nn.QuantizedEmbedding: FoldedEmbedding}
"""The library's class and ours. Its own subclasses are left alone: what they add cannot be known."""


def foldable(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, module) of every layer that `install` would replace: an embedding if it may be the output projection."""
    found = [(path, module) for path, module in model.named_modules() if type(module) in FOLDED]
    return [
        (path, module)
        for path, module in found
        if not isinstance(module, nn.QuantizedEmbedding) or path.rsplit(".", 1)[-1] in EMBEDDING_NAMES
    ]


def install(model: nn.Module, policy: FoldPolicy) -> int:
    """Put our layers where `policy` gains from them; returns how many. Names and arrays of parameters stay."""
    ruled = [(path, module, policy.rule(WeightKind.of(module))) for path, module in foldable(model)]
    replaced = [(path, _sharing(module, rule)) for path, module, rule in ruled if not rule.is_plain]
    model.update_modules(tree_unflatten(replaced))
    return len(replaced)


def shared_as(kind: Any, module: Any) -> Any:
    """A layer of another class over the same arrays; the constructor is passed by, for it draws random weights."""
    ours = kind.__new__(kind)
    nn.Module.__init__(ours)
    vars(ours).update(vars(module))
    dict.update(ours, module)
    return ours


def _sharing(module: Any, rule: FoldRule) -> Any:
    folded = shared_as(FOLDED[type(module)], module)
    folded.rule = rule
    return folded
