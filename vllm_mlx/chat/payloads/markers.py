"""Finding markers in text that is still being written."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping


class Markers:
    """A set of literal strings to look for; where two begin at one place, the longer counts.

    `never_before` has a pattern by literal: a literal with such text behind it is passed over, and one with nothing
    behind it yet is held.
    """

    def __init__(self, literals: Iterable[str], *, never_before: Mapping[str, str] = {}) -> None:
        longest_first = sorted(
            {literal for literal in literals if literal}, key=lambda literal: (-len(literal), literal)
        )
        alone = {literal: f"(?!{behind})" for literal, behind in never_before.items()}
        patterns = [re.escape(literal) + alone.get(literal, "") for literal in longest_first]
        self._pattern = re.compile("|".join(patterns) or r"(?!)")
        unsure = [*(literal[:-1] for literal in longest_first), *(one for one in longest_first if one in never_before)]
        self._held = re.compile(rf"(?:{_beginnings(unsure)})\Z")
        self._max_held = max(map(len, unsure), default=0)

    def find(self, text: str, at: int, *, is_last: bool) -> tuple[int, int]:
        """(start, end) of the first marker from `at` on.

        If there is none, both are the position up to which the text is certain to hold none: the rest may become one,
        unless the text `is_last`.
        """
        match = self._pattern.search(text, at)
        if is_last:
            return match.span() if match else (len(text), len(text))
        held = self._held.search(text, max(at, len(text) - self._max_held))
        first_held = held.start() if held else len(text)
        return match.span() if match and match.start() < first_held else (first_held, first_held)


def _beginnings(texts: list[str]) -> str:
    """A pattern of all beginnings of some texts, in a tree, so that every character is looked at once."""
    tails: dict[str, list[str]] = {}
    for text in filter(None, texts):
        tails.setdefault(text[0], []).append(text[1:])
    rests = {first: _beginnings(rest) for first, rest in tails.items()}
    either = [re.escape(first) + (f"(?:{rest})?" if rest != "(?!)" else "") for first, rest in rests.items()]
    return "|".join(either) or "(?!)"


@functools.lru_cache(maxsize=256)
def markers_of(literals: tuple[str, ...]) -> Markers:
    """The same set again and again; building one takes longer than looking for its markers in a short text."""
    return Markers(literals)
