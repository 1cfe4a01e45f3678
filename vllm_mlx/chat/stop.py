"""Stop strings, matched on text that comes in pieces."""

from __future__ import annotations


class StopMatcher:
    """Lets text through up to the first stop string.

    The first is the one that is complete first; of two that end together, the longer. So the result depends on the
    text alone, never on how it was cut into pieces. Time is linear in the text (Knuth-Morris-Pratt per string).
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._patterns = [_Pattern(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing comes through after it."""

    @property
    def num_held(self) -> int:
        """Characters that may still become a stop string."""
        return len(self._held)

    def add(self, text: str) -> str:
        """The text that cannot be the beginning of a stop string any more."""
        if not self._patterns:
            return text
        if self.matched is not None:
            return ""
        seen = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            complete = [pattern.text for pattern in self._patterns if pattern.advance(character)]
            if complete:
                self._held = ""
                self.matched = complete[0]
                return seen[: position - len(self.matched)]
        num_held = max(pattern.num_matched for pattern in self._patterns)
        self._held = seen[len(seen) - num_held :]
        return seen[: len(seen) - num_held]

    def finish(self) -> str:
        """The text still held back, at the end of all text."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """How much of one string the text so far ends with."""

    __slots__ = ("_borders", "num_matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = [0]
        """Of each prefix reached so far: the length of its longest border. Grows only as far as texts match."""

    def advance(self, character: str) -> bool:
        """Take one more character; whether the string is complete with it."""
        while self.num_matched and self.text[self.num_matched] != character:
            self.num_matched = self._borders[self.num_matched - 1]
        if self.text[self.num_matched] == character:
            self.num_matched += 1
            self._extend_borders()
        return self.num_matched == len(self.text)

    def _extend_borders(self) -> None:
        """Make the border of the matched prefix known."""
        if len(self._borders) >= self.num_matched:
            return
        last, border = self.num_matched - 1, self._borders[-1]
        while border and self.text[border] != self.text[last]:
            border = self._borders[border - 1]
        self._borders.append(border + (self.text[border] == self.text[last]))
