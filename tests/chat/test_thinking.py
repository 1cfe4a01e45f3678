"""When reasoning ends by force."""

from __future__ import annotations

import random

import pytest

from vllm_mlx.chat.reasoning import REASONING_FORMATS, reasoning_format
from vllm_mlx.chat.thinking import MAX_PERIOD, CycleDetector, ThinkingLimit, closing_text


def first_hit(tokens: list[int]) -> int | None:
    detector = CycleDetector()
    return next((i for i, token in enumerate(tokens) if detector.add(token)), None)


@pytest.mark.parametrize(
    ("period", "needed"), [(1, 256), (7, 256), (64, 256), (100, 400), (MAX_PERIOD, 4 * MAX_PERIOD)]
)
def test_cycle_is_noticed_as_soon_as_it_has_repeated_enough(period: int, needed: int) -> None:
    piece = random.Random(period).sample(range(10_000), period)
    before = [20_000, 20_001, 20_002]
    assert first_hit(before + piece * 300) == len(before) + needed - 1


def test_longer_pieces_are_no_cycle() -> None:
    piece = random.Random(0).sample(range(10_000), MAX_PERIOD + 1)
    assert first_hit(piece * 10) is None


def test_text_that_differs_anywhere_is_no_cycle() -> None:
    tokens = []
    for number in range(500):
        tokens += [1, 2, 3, 4, 5, 6, 7, 8, 9, 100 + number]
    assert first_hit(tokens) is None


def test_few_repetitions_are_no_cycle() -> None:
    assert first_hit([0] * 255 + [1]) is None
    assert first_hit(list(range(300)) * 3 + [999]) is None


def test_budget_ends_reasoning_once() -> None:
    limit = ThinkingLimit(3)
    assert [limit.add(token, num_output=token + 1) for token in range(6)] == [False, False, True, False, False, False]


def test_budget_of_nothing_is_spent_from_the_start() -> None:
    assert ThinkingLimit(0).is_spent
    assert not ThinkingLimit(None).is_spent


def test_cycle_ends_reasoning_without_a_budget_unless_that_is_switched_off() -> None:
    limit, patient = ThinkingLimit(None), ThinkingLimit(None, breaks_cycles=False)
    assert sum(limit.add(7, num_output=i) for i in range(1000)) == 1
    assert not any(patient.add(7, num_output=i) for i in range(1000))


def test_reasoning_that_leaves_no_room_for_an_end_goes_on() -> None:
    limit = ThinkingLimit(3, closing_ids=(1, 2), max_output=6)
    assert [limit.add(token, num_output=token + 2) for token in range(6)] == [False] * 6


@pytest.mark.parametrize("name", [form.name for form in REASONING_FORMATS])
def test_every_format_can_be_closed(name: str) -> None:
    form, text = reasoning_format(name), closing_text(reasoning_format(name))
    assert text is not None
    assert form.has_channels or form.closes[0] in text
