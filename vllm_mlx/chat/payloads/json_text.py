"""One JSON value (RFC 8259), read while it is written.

Four slips of models are mended on the way, so that what is passed on is valid: raw control characters in strings,
escapes that do not exist, escapes of half a character, and commas before a closing bracket.
"""

from __future__ import annotations

import json
import re

from vllm_mlx.chat.payloads.actions import NotACall, Parsing
from vllm_mlx.chat.payloads.reader import Reader

_SPACE = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'(?:[^"\\\x00-\x1f]+|\\["\\/bfnrt])+')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_HEX = frozenset("0123456789abcdefABCDEF")
_HIGH, _LOW = range(0xD800, 0xDC00), range(0xDC00, 0xE000)
"""The halves of which UTF-16 makes one character; alone they are none, and clients' parsers refuse them."""
_NO_CHARACTER = "\\ufffd"
_MAX_DEPTH = 200
_MAX_SCALAR = 400


class JsonScanner:
    """Reads one value up to the first character that cannot belong to it; that is not taken, and `error` says why."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_sure = False
        """Whether more than opening brackets was read."""
        self.is_cut_off = False
        """Whether the text ended inside the value."""
        self.error: NotACall | None = None
        self._stack: list[str] = []
        self._wanted = "value"
        self._out: list[str] = []
        self._held = ""
        self._scalar = ""
        self._in_string = self._is_key = self._is_escaped = False
        self._num_hex = 0
        self._unit = ""
        """Digits of the escape that is being read."""
        self._half = ""
        """An escape that is a character only together with the next one."""

    def take_output(self) -> str:
        """The text read since the last call, mended."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def read(self, text: str, at: int) -> int:
        """Read on from a position; returns where it stopped: the end of the text, of the value, or at the error."""
        try:
            while at < len(text) and not self.is_done:
                at = self._read_on(text, at)
        except NotACall as error:
            self._fail(error)
        return at

    def _read_on(self, text: str, at: int) -> int:
        if self._in_string:
            return self._read_string(text, at)
        if match := _SCALAR.match(text, at):
            self._scalar += match.group()
            if len(self._scalar) > _MAX_SCALAR:
                raise NotACall("a number that is too long")
            return match.end()
        if self._scalar:
            self._end_scalar()
            return at
        if match := _SPACE.match(text, at):
            self._space(match.group())
            return match.end()
        self._punctuation(text[at])
        return at + 1

    def end(self) -> None:
        """No more text comes: a number that stands alone ends here, anything else is cut off."""
        if self.is_done or self.error:
            return
        self.is_cut_off = not self._scalar or bool(self._stack)
        try:
            if self.is_cut_off:
                raise NotACall("JSON that is cut off")
            self._end_scalar()
        except NotACall as error:
            self._fail(error)

    def _fail(self, error: NotACall) -> None:
        self.error = error
        escape = "\\" if self._is_escaped else f"\\u{self._unit}" if self._num_hex else ""
        self._out.append(self._held + self._scalar + self._half + escape)
        self._held = self._scalar = self._half = ""
        self._is_escaped, self._num_hex = False, 0

    def _space(self, space: str) -> None:
        if self._held:
            self._held += space
        else:
            self._out.append(space)

    def _punctuation(self, char: str) -> None:
        if char in "}]":
            self._close(char)
            return
        if char == "," and self._wanted == "comma or end":
            self._held = ","
            self._wanted = "key" if self._stack[-1] == "{" else "value"
            return
        if not self._fits(char):
            raise NotACall(f"unexpected {char!r} in JSON")
        self._emit_held()
        self._out.append(char)
        if char == '"' and self._wanted in ("key", "key or end"):
            self._in_string = self._is_key = self.is_sure = True
        elif char == ":":
            self._wanted = "value"
        elif char == '"':
            self._in_string = self.is_sure = True
        else:
            self._open(char)

    def _fits(self, char: str) -> bool:
        if self._wanted in ("key", "key or end"):
            return char == '"'
        if self._wanted == "colon":
            return char == ":"
        return self._wanted in ("value", "value or end") and char in '"{['

    def _open(self, char: str) -> None:
        if len(self._stack) == _MAX_DEPTH:
            raise NotACall("JSON that is nested too deeply")
        self._stack.append(char)
        self._wanted = "key or end" if char == "{" else "value or end"

    def _close(self, char: str) -> None:
        may_end = self._wanted in ("comma or end", "key or end", "value or end") or bool(self._held)
        if not may_end or not self._stack or self._stack[-1] + char not in ("{}", "[]"):
            raise NotACall(f"unexpected {char!r} in JSON")
        self._stack.pop()
        self._held = ""
        self._out.append(char)
        self._end_value()

    def _emit_held(self) -> None:
        if self._held:
            self._out.append(self._held)
            self._held = ""

    def _end_value(self) -> None:
        self.is_sure = True
        self.is_done = not self._stack
        self._wanted = "comma or end"

    def _end_scalar(self) -> None:
        scalar, self._scalar = self._scalar, ""
        is_valid = scalar in ("true", "false", "null") or _NUMBER.fullmatch(scalar)
        if not is_valid or self._wanted not in ("value", "value or end"):
            self._scalar = scalar
            raise NotACall(f"unexpected {scalar[:40]!r} in JSON")
        self._emit_held()
        self._out.append(scalar)
        self._end_value()

    def _read_string(self, text: str, at: int) -> int:
        if not self._is_escaped and (match := _PLAIN.match(text, at)) and not self._num_hex:
            self._end_half()
            self._out.append(match.group())
            return match.end()
        char = text[at]
        if self._num_hex:
            self._hex(char)
        elif self._is_escaped:
            self._escape(char)
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._end_half()
            self._end_string()
        else:
            self._end_half()
            self._out.append(json.dumps(char)[1:-1])
        return at + 1

    def _end_string(self) -> None:
        self._out.append('"')
        self._in_string = False
        if self._is_key:
            self._is_key = False
            self._wanted = "colon"
        else:
            self._end_value()

    def _escape(self, char: str) -> None:
        self._is_escaped = False
        if char == "u":
            self._num_hex, self._unit = 4, ""
            return
        self._end_half()
        if char in '"\\/bfnrt':
            self._out.append("\\" + char)
        elif char == "'":
            self._out.append("'")
        else:
            self._out.append("\\\\" + json.dumps(char, ensure_ascii=False)[1:-1])

    def _hex(self, char: str) -> None:
        if char not in _HEX:
            raise NotACall("a broken escape in JSON")
        self._num_hex -= 1
        self._unit += char
        if not self._num_hex:
            self._end_unit()

    def _end_unit(self) -> None:
        value, escape = int(self._unit, 16), f"\\u{self._unit}"
        if value in _LOW and self._half:
            self._out.append(self._half + escape)
            self._half = ""
            return
        self._end_half()
        if value in _HIGH:
            self._half = escape
        else:
            self._out.append(_NO_CHARACTER if value in _LOW else escape)

    def _end_half(self) -> None:
        if self._half:
            self._out.append(_NO_CHARACTER)
            self._half = ""


def read_json(reader: Reader) -> Parsing[str]:
    """The text of one whole value. Raises NotACall if it is not JSON or is cut off."""
    scanner = JsonScanner()
    while True:
        text, at = reader.window()
        reader.take_to(scanner.read(text, at))
        if reader.is_over:
            scanner.end()
        if scanner.error:
            raise scanner.error
        if scanner.is_done:
            return scanner.take_output()
        yield None


def mended(text: str) -> str:
    """A text that is one whole value. Raises NotACall if it is not JSON."""
    scanner = JsonScanner()
    end = scanner.read(text, 0)
    scanner.end()
    if scanner.error or text[end:].strip():
        raise scanner.error or NotACall("text behind JSON")
    return scanner.take_output()


def read_json_string(reader: Reader) -> Parsing[str]:
    """A string, decoded. Raises NotACall for anything else."""
    if (yield from reader.peek()) != '"':
        raise NotACall("expected a string")
    return str(json.loads((yield from read_json(reader))))
