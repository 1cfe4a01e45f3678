"""Stop strings: the result depends on the text alone, and as little as possible is held back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.chat.stop import StopMatcher

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)
PIECES = st.lists(st.text("abc", max_size=6), max_size=12)


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.add(piece) for piece in pieces)
    return text + matcher.finish(), matcher.matched


def by_definition(stops: tuple[str, ...], text: str) -> tuple[str, str | None]:
    """Read the text character by character, look at its end each time."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops=STOPS, pieces=PIECES)
def test_any_split_gives_what_the_definition_says(stops: tuple[str, ...], pieces: list[str]) -> None:
    assert run(stops, pieces) == by_definition(stops, "".join(pieces))


@given(stops=STOPS, pieces=PIECES)
def test_held_back_is_only_what_may_begin_a_stop_string(stops: tuple[str, ...], pieces: list[str]) -> None:
    matcher, seen, out = StopMatcher(stops), "", ""
    for piece in pieces:
        seen += piece
        out += matcher.add(piece)
        if matcher.matched is not None:
            return
        held = seen[len(out) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize("pieces", [["hello END", " more"], ["hello E", "N", "D more"], list("hello END more")])
def test_text_ends_before_the_stop_string(pieces: list[str]) -> None:
    assert run(("END", "###"), pieces) == ("hello ", "END")


def test_text_that_only_began_like_a_stop_string_is_let_through() -> None:
    matcher = StopMatcher(("\n\nUser:",))
    assert [matcher.add(piece) for piece in ("a\n", "\nUse", "ful")] == ["a", "", "\n\nUseful"]


def test_overlapping_beginnings_are_seen() -> None:
    assert run(("aab",), ["aaa", "ab"]) == ("aa", "aab")


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(("x",))
    assert [matcher.add("ax"), matcher.add("b"), matcher.finish()] == ["a", "", ""]


def test_without_stop_strings_text_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.add("text") == "text"
    assert matcher.finish() == ""


def test_long_stop_string_costs_no_more_than_the_text() -> None:
    stop = "a" * 1_000_000 + "b"
    assert run((stop,), ["a" * 5000, "c"]) == ("a" * 5000 + "c", None)
