"""Which way of multiplying is chosen, from given times and from this machine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from vllm_mlx.runner import fold_timing
from vllm_mlx.runner.fold_timing import DeviceStopwatch, choose, expanded_gains, measure, should_expand
from vllm_mlx.runner.quantised import ALWAYS_FOLD, Way, WeightKind

STRAIGHT, FOLD, PAD = Way.STRAIGHT, Way.FOLD, Way.PAD

# Microseconds by row count of 4-bit weights on an H200, as multiplied one row at a time and as a matrix.
LAYER = {1: 27.0, 2: 45.0, 4: 76.0, 8: 100.0, 16: 197.0, 32: 330.0, 64: 665.0}
LAYER_FOLDED = {1: 26.0, 2: 45.0, 4: 79.0, 8: 36.0, 16: 36.0, 32: 40.0, 64: 45.0}
LAYER_PADDED = 38.0
LAYER_EXPANDED = {1: 25.0, 16: 33.0, 64: 34.0}


class Watch:
    """Answers from a table; keeps what it was asked."""

    def __init__(self, answer: Callable[[WeightKind, int, Way | None], float]) -> None:
        self.answer = answer
        self.asked: list[tuple[WeightKind, int, Way | None]] = []

    def __call__(self, modules: Sequence[Any], rows: int, way: Way | None) -> float:
        self.asked.append((WeightKind.of(modules[0]), rows, way))
        return self.answer(*self.asked[-1])


def cuda(kind: WeightKind, rows: int, way: Way | None) -> float:
    if way is None:
        return LAYER_EXPANDED[rows]
    return {STRAIGHT: LAYER[rows], FOLD: LAYER_FOLDED[rows], PAD: LAYER_PADDED}[way]


def metal(kind: WeightKind, rows: int, way: Way | None) -> float:
    """Folding is what the library does there anyway."""
    return 100.0 + rows if way is not PAD else 116.0


class Layers(nn.Module):
    """Three kinds of weight, and a table of a kind that linear layers have too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(96, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.large = [nn.Linear(64, 256, bias=False) for _ in range(3)]
        self.small = nn.Linear(64, 32, bias=False)
        nn.quantize(self, 64, 4)


LARGE, HEAD, SMALL = (WeightKind(out_dims, 64, 4, 64, "affine") for out_dims in (256, 96, 32))


def test_on_cuda_few_rows_are_padded_and_many_folded() -> None:
    policy = choose(measure(Layers(), Watch(cuda)))
    assert [kind for kind, _ in policy.rules] == [LARGE, HEAD, SMALL]
    rule = policy.rule(LARGE)
    ways = {rows: rule.way(rows) for rows in (1, 2, 3, 4, 7, 8, 15, 16, 64, 300)}
    assert ways == {1: STRAIGHT, 2: PAD, 3: PAD, 4: PAD, 7: PAD, 8: FOLD, 15: FOLD, 16: FOLD, 64: FOLD, 300: FOLD}


def test_on_metal_nothing_changes() -> None:
    assert all(rule.is_plain for _, rule in choose(measure(Layers(), Watch(metal))).rules)


def test_kinds_are_measured_apart() -> None:
    def answer(kind: WeightKind, rows: int, way: Way | None) -> float:
        return cuda(kind, rows, way) if kind == LARGE else metal(kind, rows, way)

    policy = choose(measure(Layers(), Watch(answer)))
    assert not policy.rule(LARGE).is_plain
    assert policy.rule(SMALL).is_plain


def test_one_row_is_padded_only_for_a_clear_gain() -> None:
    def answer(seconds: float) -> Callable[[WeightKind, int, Way | None], float]:
        return lambda _, rows, way: seconds if way is PAD else 259.0

    assert choose(measure(Layers(), Watch(answer(228.0)))).rule(LARGE).way(1) is PAD
    assert choose(measure(Layers(), Watch(answer(250.0)))).rule(LARGE).way(1) is STRAIGHT


def test_a_hopeless_way_is_not_measured_further() -> None:
    watch = Watch(cuda)
    measure(Layers(), watch)
    assert max(rows for kind, rows, way in watch.asked if kind == LARGE and way is STRAIGHT) == 8
    assert max(rows for kind, rows, way in watch.asked if kind == LARGE and way is FOLD) == 64


def test_measuring_stops_when_the_time_is_over() -> None:
    now = [0.0]

    def answer(kind: WeightKind, rows: int, way: Way | None) -> float:
        now[0] += 0.1
        return cuda(kind, rows, way)

    watch = Watch(answer)
    measured = measure(Layers(), watch, budget_s=0.75, clock=lambda: now[0])
    assert {kind for kind, _, _ in watch.asked} == {LARGE}
    assert measured[0].rows[-1].rows == 4
    policy = choose(measured)
    assert [policy.rule(LARGE).way(rows) for rows in (1, 4, 8, 64)] == [STRAIGHT, PAD, FOLD, FOLD]
    assert policy.rule(SMALL) == policy.rule(LARGE)


def test_without_any_measurement_rows_are_folded() -> None:
    measured = measure(Layers(), Watch(cuda), budget_s=0.0, clock=lambda: 0.0)
    assert measured == ()
    assert choose(measured).rule(LARGE) == ALWAYS_FOLD
    assert not should_expand(expanded_gains(measured))


def test_expanded_weights_are_measured_only_when_asked_for() -> None:
    watch = Watch(cuda)
    assert expanded_gains(measure(Layers(), watch)) == {}
    assert all(way is not None for _, _, way in watch.asked)


def test_gains_count_every_weight_of_a_step() -> None:
    """The embedding shares a kind with the head, and is looked up only."""

    def answer(kind: WeightKind, rows: int, way: Way | None) -> float:
        quantised = {LARGE: 10.0, HEAD: 40.0, SMALL: 1.0}[kind]
        return quantised if way is not None else 20.0

    gains = expanded_gains(measure(Layers(), Watch(answer), expanded=True))
    assert gains == pytest.approx(dict.fromkeys((1, 16, 64), (3 * 10 + 40 + 1) / (5 * 20)))


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({1: 1.0, 16: 1.1, 64: 1.4}, True),
        ({1: 0.95, 16: 1.1, 64: 1.4}, True),
        ({1: 0.7, 16: 1.1, 64: 9.0}, False),  # a single stream would lose
        ({1: 1.0, 16: 0.95, 64: 0.95}, False),
        ({1: 2.0, 16: 2.0}, False),  # not all measured
        ({}, False),
    ],
)
def test_weights_are_expanded_where_nothing_is_lost(gains: Mapping[int, float], expected: bool) -> None:
    assert should_expand(dict(gains)) is expected


def test_large_kinds_are_measured_with_fewer_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = set()

    def watch(modules: Sequence[Any], rows: int, way: Way | None) -> float:
        numbers.add((WeightKind.of(modules[0]), len(modules)))
        return 1.0

    monkeypatch.setattr(fold_timing, "MAX_EXPANDED_BYTES", 2 * 4 * 64 * 256)
    measure(Layers(), watch)
    assert numbers == {(LARGE, 2), (HEAD, 2), (SMALL, 1)}


def test_the_device_is_timed() -> None:
    model = Layers()
    mx.eval(model.parameters())
    stopwatch = DeviceStopwatch(mx.float32)
    times = [stopwatch(model.large, rows, way) for rows in (1, 5) for way in (STRAIGHT, FOLD, PAD, None)]
    assert all(seconds > 0 for seconds in times)
