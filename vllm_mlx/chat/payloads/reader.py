"""Text that arrives in pieces, read as if it were all there.

Every method that decides something decides it on the same characters whatever the pieces were, so that a parser built
from these methods finds the same calls for any split of the text.
"""

from __future__ import annotations

import re

from vllm_mlx.chat.payloads.actions import NotACall, Parsing
from vllm_mlx.chat.payloads.markers import Markers, markers_of

_LONG_ENOUGH = 64
"""No literal that is looked for has more characters."""
_SPACE = re.compile(r"\s+")


def _may_become(text: str, literals: tuple[str, ...]) -> bool:
    return any(len(literal) > len(text) and literal.startswith(text) for literal in literals)


class Reader:
    """A window on the text. What was taken since `mark` can be put back with `restore`."""

    def __init__(self) -> None:
        self.is_over = False
        """Whether no more text comes."""
        self._text = ""
        self._at = 0
        self._taken: list[str] = []
        self._marked_at: int | None = 0
        """Where the mark lies in the present text; None if text from before a feed was taken since."""

    def feed(self, text: str) -> None:
        """More text arrived."""
        self._marked_at = 0 if self._marked_at == self._at else None
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """The text is complete."""
        self.is_over = True

    def mark(self) -> None:
        """What was taken until now is settled."""
        self._taken.clear()
        self._marked_at = self._at

    def restore(self) -> None:
        """Put back what was taken since the mark."""
        if self._marked_at is not None:
            self._at = self._marked_at
        elif self._taken:
            self._text = "".join(self._taken) + self._text[self._at :]
            self._at = self._marked_at = 0
        self._taken.clear()

    def mark_before(self, marker: str) -> None:
        """Like `mark`, but the marker that `advance` has just found can still be put back."""
        self._taken[:] = [marker]
        self._marked_at = self._at - len(marker)

    @property
    def is_empty(self) -> bool:
        """Whether all text that has arrived was taken."""
        return self._at >= len(self._text)

    def advance(self, markers: Markers) -> tuple[str, str]:
        """(text before the first marker, marker), as far as that is certain now; the marker is '' if none came yet."""
        start, end = markers.find(self._text, self._at, is_last=self.is_over)
        piece, marker = self._text[self._at : start], self._text[start:end]
        self._take(end - self._at)
        return piece, marker

    def until(self, *literals: str) -> Parsing[tuple[str, str]]:
        """All text before the first of some markers, and that marker. Raises NotACall if none ever comes."""
        markers = markers_of(literals)
        pieces = []
        while True:
            piece, marker = self.advance(markers)
            pieces.append(piece)
            if marker:
                return "".join(pieces), marker
            if self.is_over:
                raise NotACall(f"no {' or '.join(literals)}")
            yield None

    def peek(self) -> Parsing[str]:
        """The next character without taking it; '' at the end."""
        while self.is_empty and not self.is_over:
            yield None
        return self._text[self._at : self._at + 1]

    def run(self, pattern: re.Pattern[str]) -> Parsing[str]:
        """The longest run of characters of a class (the pattern is `[...]+`); may be ''."""
        pieces = []
        while True:
            if match := pattern.match(self._text, self._at):
                pieces.append(match.group())
                self._take(match.end() - self._at)
            if not self.is_empty or self.is_over:
                return "".join(pieces)
            yield None

    def space(self) -> Parsing[str]:
        """White space, if there is any."""
        return self.run(_SPACE)

    def accept(self, *literals: str) -> Parsing[str]:
        """Take the longest of some literals that comes next; '' if none does."""
        while not self.is_over:
            rest = self._text[self._at : self._at + _LONG_ENOUGH]
            if len(rest) == _LONG_ENOUGH or not _may_become(rest, literals):
                break
            yield None
        found = ""
        for literal in literals:
            if len(literal) > len(found) and self._text.startswith(literal, self._at):
                found = literal
        self._take(len(found))
        return found

    def expect(self, *literals: str) -> Parsing[str]:
        """Like `accept`, but raises NotACall if none comes next."""
        found = yield from self.accept(*literals)
        if not found:
            raise NotACall(f"expected {' or '.join(literals)}")
        return found

    def window(self) -> tuple[str, int]:
        """The text that has arrived, and where the part that was not taken begins; for scanners."""
        return self._text, self._at

    def give_back_space(self) -> None:
        """Put back the white space that was taken last, as far as it was taken since the mark."""
        taken = "".join(self._taken)
        space = taken[len(taken.rstrip()) :]
        if self._marked_at is not None:
            self._at -= len(space)
        elif space:
            self._text = space + self._text[self._at :]
            self._at = 0

    def take(self, length: int) -> str:
        """Take some characters that have arrived."""
        piece = self._text[self._at : self._at + length]
        self._take(length)
        return piece

    def take_to(self, position: int) -> None:
        """Take up to a position of `window`."""
        self._take(position - self._at)

    def give_back(self, text: str) -> None:
        """Put back the marker that `until` or `advance` has just found."""
        self._at -= len(text)
        if self._taken:
            self._taken[-1] = self._taken[-1].removesuffix(text)
        if self._marked_at is not None:
            self._marked_at = min(self._marked_at, self._at)

    def _take(self, length: int) -> None:
        if length:
            self._taken.append(self._text[self._at : self._at + length])
            self._at += length
