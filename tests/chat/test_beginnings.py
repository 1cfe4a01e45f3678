"""Tokens of texts in pieces are those of the pieces in a row, and texts are forgotten in good time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mlx.chat import beginnings
from vllm_mlx.chat.beginnings import Beginnings

TOKENS = {"a": (1, 2, 3), "b": (1000,), "c": (), "d": (5, 6)}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "MIN_TOKENS", 1)


def joined(known: Beginnings, pieces: Sequence[str]) -> tuple[int, ...]:
    return known.join(list(pieces), [array("I", TOKENS[piece]) for piece in pieces])


@given(texts=st.lists(st.text("abcd", min_size=1, max_size=8), max_size=12), most=st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_tokens_are_those_of_the_pieces_in_a_row(texts: list[str], most: int) -> None:
    known = Beginnings(max_texts=3, max_tokens=most)
    for text in texts:
        assert joined(known, text) == tuple(token_id for piece in text for token_id in TOKENS[piece])
        assert len(known) <= 3


def test_what_was_there_is_taken_over_and_not_made_again() -> None:
    known = Beginnings()
    [_, *before] = joined(known, "bbbd")
    [_, *after] = joined(known, "bbba")
    assert all(one is other for one, other in zip(before[:2], after[:2], strict=True))


def test_the_next_turn_takes_the_place_of_the_one_before() -> None:
    known = Beginnings()
    joined(known, "aab")
    joined(known, "aaab")
    assert len(known) == 1
    joined(known, "dab")
    assert len(known) == 2


def test_texts_used_longest_ago_go_and_one_that_is_too_long_is_not_kept() -> None:
    known = Beginnings(max_tokens=6)
    joined(known, "aa")
    joined(known, "ddd")
    assert len(known) == 1
    joined(known, "ab" * 4)
    assert len(known) == 1


def test_a_text_that_is_long_for_its_tokens_is_not_kept() -> None:
    known = Beginnings()
    assert known.join([" " * 33], [array("I", (1, 2))]) == (1, 2)
    assert len(known) == 0
    assert known.join([" " * 32], [array("I", (1, 2))]) == (1, 2)
    assert len(known) == 1
