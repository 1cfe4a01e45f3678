"""What is kept, and what goes first."""

from __future__ import annotations

import pytest

from vllm_mlx.core.kept import Kept


def test_what_nobody_asked_for_longest_goes_first() -> None:
    kept: Kept[str, int] = Kept(2)
    kept.add("a", 1)
    kept.add("b", 2)
    assert kept.get("a") == 1
    kept.add("c", 3)
    assert [kept.get(key) for key in "abc"] == [1, None, 3]
    assert len(kept) == 2


@pytest.fixture
def texts() -> Kept[str, str]:
    return Kept(10, weigh=lambda _, value: len(value))


def test_weights_are_bounded_together(texts: Kept[str, str]) -> None:
    texts.add("a", "1234")
    texts.add("b", "1234")
    texts.add("c", "123")
    assert [texts.get(key) for key in "abc"] == [None, "1234", "123"]


def test_what_is_too_heavy_is_not_kept_and_drives_out_nothing(texts: Kept[str, str]) -> None:
    texts.add("a", "1234")
    texts.add("b", "12345678901")
    assert [texts.get(key) for key in "ab"] == ["1234", None]


def test_a_value_takes_the_place_of_the_one_before(texts: Kept[str, str]) -> None:
    texts.add("a", "1234567890")
    texts.add("a", "12")
    texts.add("b", "12345678")
    assert [texts.get(key) for key in "ab"] == ["12", "12345678"]
    texts.add("a", "12345678901")
    assert texts.get("a") is None, "the value before is not the value now"
