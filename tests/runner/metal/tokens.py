"""Tokens of preprocessed Metal text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

TOKEN = re.compile(
    r"""
      (?P<line>^[ \t]*\#[^\n]*)
    | (?P<space>\s+)
    | (?P<name>[A-Za-z_]\w*)
    | (?P<number>(?:\d|\.\d)(?:[eEpP][+-]|[\w.'])*)
    | (?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    | (?P<mark>::|->|\+\+|--|<<=|>>=|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)
    """,
    re.VERBOSE | re.MULTILINE,
)
LINE_MARKER = re.compile(r'\s*#(?:line)? (\d+) "')


class NotMetalError(RuntimeError):
    """The text is no Metal, or uses more of it than the emulator knows. The message starts with the line."""


@dataclass(frozen=True)
class Token:
    kind: str
    """'line' (a directive), 'space', 'name', 'number', 'text' or 'mark'."""
    text: str
    line: int
    """Of the text before it was preprocessed, as its line markers tell."""

    @property
    def is_blank(self) -> bool:
        return self.kind in ("line", "space")


def tokenise(text: str) -> Iterator[Token]:
    line = 1
    for match in TOKEN.finditer(text):
        kind, token = str(match.lastgroup), match.group()
        yield Token(kind, token, line)
        marker = LINE_MARKER.match(token) if kind == "line" else None
        # a marker names the line after it, and its own line break still comes
        line = int(marker[1]) - 1 if marker else line + token.count("\n")


def refuse(token: Token, message: str) -> NoReturn:
    raise NotMetalError(f"line {token.line}: {message}")


class Reader:
    """Tokens with a place among them. Places past the end read as an empty mark."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    def after(self, place: int) -> int:
        """Place of the first token at or after a place that is not blank."""
        while place < len(self.tokens) and self.tokens[place].is_blank:
            place += 1
        return place

    def before(self, place: int) -> int:
        """Place of the last token before a place that is not blank; -1 if there is none."""
        place -= 1
        while place >= 0 and self.tokens[place].is_blank:
            place -= 1
        return place

    def get(self, place: int) -> Token:
        return self.tokens[place] if 0 <= place < len(self.tokens) else Token("mark", "", 0)

    @property
    def next(self) -> str:
        """Text of the next token that is not blank."""
        return self.get(self.after(self.at)).text

    def opening_of(self, place: int) -> int:
        """Place of the parenthesis that the one at `place` closes."""
        depth = 0
        for at in range(place, -1, -1):
            depth += (self.tokens[at].text == ")") - (self.tokens[at].text == "(")
            if not depth:
                return at
        return 0
