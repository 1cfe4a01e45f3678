"""Finding markers in text that is still being written."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping


class Markers:
    """A set of literal strings to look for; where two begin at one place, the longer counts.

    `never_before` has patterns of a character by literal: a literal with such a character behind it is passed over.
    """

    def __init__(self, literals: Iterable[str], *, never_before: Mapping[str, str] = {}) -> None:
        longest_first = sorted(
            {literal for literal in literals if literal}, key=lambda literal: (-len(literal), literal)
        )
        alone = {literal: f"(?!{behind})" for literal, behind in never_before.items()}
        patterns = [re.escape(literal) + alone.get(literal, "") for literal in longest_first]
        self._pattern = re.compile("|".join(patterns) or r"(?!)")
        self._prefixes = frozenset(literal[:end] for literal in longest_first for end in range(1, len(literal)))
        firsts = "".join(sorted({literal[0] for literal in longest_first}))
        self._firsts = re.compile(f"[{re.escape(firsts)}]") if firsts else re.compile(r"(?!)")
        self._max_held = max((len(literal) for literal in longest_first), default=1) - 1

    def find(self, text: str, at: int, *, is_last: bool) -> tuple[int, int]:
        """(start, end) of the first marker from `at` on.

        If there is none, both are the position up to which the text is certain to hold none: the rest may become one,
        unless the text `is_last`.
        """
        match = self._pattern.search(text, at)
        if is_last:
            return match.span() if match else (len(text), len(text))
        held = self._held(text, at)
        return match.span() if match and match.start() < held else (held, held)

    def _held(self, text: str, at: int) -> int:
        start = max(at, len(text) - self._max_held)
        while match := self._firsts.search(text, start):
            start = match.start()
            if text[start:] in self._prefixes:
                return start
            start += 1
        return len(text)


@functools.lru_cache(maxsize=256)
def markers_of(literals: tuple[str, ...]) -> Markers:
    """The same set again and again; building one takes longer than looking for its markers in a short text."""
    return Markers(literals)
