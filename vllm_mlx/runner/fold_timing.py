"""Measures, on this device and with the model's own weights, which way of multiplying quantised weights is fastest.

A policy is chosen from numbers only, so that tests can bring their own. Calls are chained in one graph, each waiting
for the one before, as in a decode step, and go round the weights of several layers, as a step does: a single weight
would be found in the device's cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from vllm_mlx.runner.quantised import (
    ALWAYS_FOLD,
    PADDED_ROWS,
    FoldPolicy,
    FoldRule,
    Way,
    WeightKind,
    foldable,
    multiply,
)

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
EXPANDED_ROW_COUNTS = (1, 16, 64)
"""Where expanded weights are compared with quantised ones: one stream, a small batch, a large one."""
NUM_CALLS = 16
NUM_REPEATS = 3
MAX_WEIGHTS = 8
MAX_EXPANDED_BYTES = 1 << 30
"""Memory for expanded copies while a kind of weight is measured; one weight may take more."""
CLEAR_GAIN = 0.9
"""A way that changes the shape must take at most this part of the straight way's time: timings are noisy."""
HOPELESS = 2.0
"""The straight way is not measured at more rows once it takes this many times the best."""
TOLERATED_LOSS = 1.1
"""Expanded weights may take this many times the quantised ones' time at one row count if they win over all."""


@dataclass(frozen=True, slots=True)
class RowTimes:
    """Seconds per product of one kind of weight at one row count."""

    rows: int
    ways: tuple[tuple[Way, float], ...]
    expanded_s: float | None = None
    """With the weight expanded; None if not measured."""

    @property
    def best_s(self) -> float:
        """Seconds of the fastest way."""
        return min(seconds for _, seconds in self.ways)


@dataclass(frozen=True, slots=True)
class KindTimes:
    """What was measured of one kind of weight."""

    kind: WeightKind
    num_weights: int
    """How many weights of this kind a step multiplies with. An embedding counts if there is no other of its kind."""
    rows: tuple[RowTimes, ...]


class Stopwatch(Protocol):
    """Times one product."""

    def __call__(self, modules: Sequence[Any], rows: int, way: Way | None) -> float:
        """Seconds per product of `rows` rows, in turn with these modules of one kind; None: expanded weights."""


def measure(
    model: nn.Module,
    stopwatch: Stopwatch,
    *,
    expanded: bool = False,
    budget_s: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[KindTimes, ...]:
    """Time every kind of quantised weight, those with the most bytes first, until `budget_s` has passed.

    With `expanded`, expanded weights too. The weights must have been loaded.
    """
    kinds: dict[WeightKind, list[Any]] = {}
    for _, module in foldable(model):
        kinds.setdefault(WeightKind.of(module), []).append(module)
    ordered = sorted(kinds.items(), key=lambda item: -sum(module.weight.nbytes for module in item[1]))
    ends_at = clock() + budget_s
    measured = []
    for kind, modules in ordered:
        if clock() >= ends_at:
            break
        chosen = _spread(modules, kind)
        times = _measure_kind(chosen, stopwatch, expanded=expanded, is_over=lambda: clock() >= ends_at)
        num_weights = sum(isinstance(module, nn.QuantizedLinear) for module in modules)
        measured.append(KindTimes(kind, num_weights or 1, tuple(times)))
    return tuple(measured)


def _spread(modules: list[Any], kind: WeightKind) -> list[Any]:
    """A few modules of one kind, fewer if they are large."""
    most = max(1, MAX_EXPANDED_BYTES // (4 * kind.out_dims * kind.in_dims))
    return modules[: min(MAX_WEIGHTS, most)]


def _measure_kind(
    modules: list[Any], stopwatch: Stopwatch, *, expanded: bool, is_over: Callable[[], bool]
) -> Iterable[RowTimes]:
    is_hopeless = False
    for rows in ROW_COUNTS:
        ways = [Way.FOLD] if is_hopeless else [Way.STRAIGHT, Way.FOLD] if rows > 1 else [Way.STRAIGHT]
        if rows < PADDED_ROWS:
            ways.append(Way.PAD)
        times = {way: stopwatch(modules, rows, way) for way in ways}
        compared = expanded and rows in EXPANDED_ROW_COUNTS
        found = RowTimes(rows, tuple(times.items()), stopwatch(modules, rows, None) if compared else None)
        is_hopeless = is_hopeless or times[Way.STRAIGHT] > HOPELESS * found.best_s
        yield found
        if is_over():
            return


def choose(measured: Sequence[KindTimes]) -> FoldPolicy:
    """The fastest way for every measured kind and row count; between row counts, that of the one below.

    Where there was no time to measure, rows are folded: that costs nothing where it gains nothing. Kinds for which
    there was none at all follow the largest one that was measured.
    """
    rules = tuple((times.kind, _rule(times.rows)) for times in measured)
    return FoldPolicy(rules, default=rules[0][1] if rules else ALWAYS_FOLD)


def _rule(measured: Sequence[RowTimes]) -> FoldRule:
    ranges: list[tuple[int, Way]] = []
    for times in measured:
        way = _fastest(dict(times.ways))
        if not ranges or ranges[-1][1] is not way:
            ranges.append((times.rows, way))
    unmeasured = [rows for rows in ROW_COUNTS if rows > measured[-1].rows]
    if unmeasured:
        ranges.append((unmeasured[0], Way.FOLD))
    return FoldRule(tuple(ranges))


def _fastest(seconds: dict[Way, float]) -> Way:
    """The simplest way that no other beats clearly."""
    best = Way.STRAIGHT if Way.STRAIGHT in seconds else Way.FOLD
    for way in (Way.FOLD, Way.PAD):
        if way in seconds and seconds[way] < CLEAR_GAIN * seconds[best]:
            best = way
    return best


def expanded_gains(measured: Sequence[KindTimes]) -> dict[int, float]:
    """Per compared row count, how many times faster the products of a whole step are with expanded weights."""
    gains = {}
    for rows in EXPANDED_ROW_COUNTS:
        found = [(times.num_weights, at) for times in measured for at in times.rows if at.rows == rows]
        both = [(number * at.best_s, number * at.expanded_s) for number, at in found if at.expanded_s is not None]
        if both:
            gains[rows] = sum(quantised for quantised, _ in both) / sum(dense for _, dense in both)
    return gains


def should_expand(gains: dict[int, float]) -> bool:
    """Whether expanded weights are faster over all row counts and lose little at any."""
    if len(gains) < len(EXPANDED_ROW_COUNTS):
        return False
    product = 1.0
    for gain in gains.values():
        product *= gain
    return product > 1 and min(gains.values()) * TOLERATED_LOSS >= 1


class DeviceStopwatch:
    """A `Stopwatch` for the real device: chained products on activations of one type."""

    def __init__(self, dtype: mx.Dtype) -> None:
        self._dtype = dtype
        self._expanded: tuple[Sequence[Any], list[mx.array]] = ((), [])

    def __call__(self, modules: Sequence[Any], rows: int, way: Way | None) -> float:
        """Seconds per product, best of a few runs."""
        dims = WeightKind.of(modules[0]).in_dims
        x = mx.random.normal((rows, 1, dims), key=mx.random.key(rows)).astype(self._dtype)
        mx.eval(x)
        run = self._chain(self._matmuls(modules, expanded=way is None), x, way=way or Way.STRAIGHT)
        run()  # the first run loads kernels
        return min(run() for _ in range(NUM_REPEATS)) / NUM_CALLS

    def _matmuls(self, modules: Sequence[Any], *, expanded: bool) -> list[Callable[[mx.array], mx.array]]:
        if not expanded:
            return [_quantised_matmul(module) for module in modules]
        if self._expanded[0] is not modules:
            self._expanded = (modules, [])  # the copies of the kind before go first
            self._expanded[1].extend(_dequantised(module, self._dtype).T for module in modules)
            mx.eval(self._expanded[1])
        return [partial(_matmul, weight) for weight in self._expanded[1]]

    @staticmethod
    def _chain(matmuls: list[Callable[[mx.array], mx.array]], x: mx.array, *, way: Way) -> Callable[[], float]:
        def run() -> float:
            y = x
            for matmul in islice(cycle(matmuls), NUM_CALLS):
                y = mx.maximum(x, multiply(matmul, y, way=way)[..., :1])  # so that the next one has to wait
            begun = time.perf_counter()
            mx.eval(y)
            return time.perf_counter() - begun

        return run


def _matmul(weight: mx.array, x: mx.array) -> mx.array:
    return x @ weight


def _quantised_matmul(module: Any) -> Callable[[mx.array], mx.array]:
    def matmul(x: mx.array) -> mx.array:
        settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        return mx.quantized_matmul(x, module.weight, module.scales, module.get("biases"), **settings)

    return matmul


def _dequantised(module: Any, dtype: mx.Dtype) -> mx.array:
    settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return mx.dequantize(module.weight, module.scales, module.get("biases"), **settings).astype(dtype)
