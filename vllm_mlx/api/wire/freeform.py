"""Freeform tools, which take one plain text: what clients say of them, and their text out of JSON arguments."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

from pydantic import Field

from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.chat.plain_tools import FREEFORM_ARGUMENT
from vllm_mlx.core.chat import Tool
from vllm_mlx.core.shape import OutputShape

_OPENING = re.compile(r'\s*\{\s*"' + re.escape(FREEFORM_ARGUMENT) + r'"\s*:\s*"')
_HIGH = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_LOW = r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_WHOLE = re.compile(rf'(?:[^"\\]+|\\["\\/bfnrt]|{_HIGH}{_LOW}|(?!{_HIGH})\\u[0-9a-fA-F]{{4}})+')
"""Characters of a JSON string that are complete: the end of what is there may be half of one."""
_CLOSING = re.compile(r'(?:"\s*\}?\s*)?')


class LarkOrRegex(WireModel):
    """A grammar."""

    syntax: Literal["lark", "regex"]
    """How `definition` is written."""
    definition: Annotated[str, Field(min_length=1)]
    """The grammar."""


class AnyText(WireModel):
    """Any text."""

    type: Literal["text"]
    """`text`."""


def freeform_tool(name: str, description: str | None, grammar: LarkOrRegex | None, *, param: str) -> Tool:
    """The tool in no dialect; its description tells the model the grammar, whose field is `param`."""
    if grammar is None:
        return Tool(name, description, is_freeform=True)
    is_lark = grammar.syntax == "lark"
    syntax = OutputShape("grammar" if is_lark else "regex", grammar.definition, param=param)
    shown = "this Lark grammar" if is_lark else "this regular expression"
    told = f"{description or ''}\n\nThe input must match {shown}:\n{grammar.definition}".strip()
    return Tool(name, told, is_freeform=True, syntax=syntax)


def freeform_arguments(text: str) -> str:
    """The JSON arguments that carry a text."""
    return json.dumps({FREEFORM_ARGUMENT: text}, ensure_ascii=False)


class FreeformReader:
    """Gives out the text while the arguments grow. The pieces, joined, are `text`.

    Arguments that are not an object with the one string are the text themselves: nothing the model wrote is lost but
    half of an escape at the end of arguments that were cut off.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._unread = ""
        self._is_open = False

    @property
    def text(self) -> str:
        """What was given out so far."""
        return "".join(self._pieces)

    def more(self, arguments: str) -> str:
        """The text that more of the arguments gives."""
        self._unread += arguments
        if not self._is_open:
            opening = _OPENING.match(self._unread)
            if opening is None:
                return ""
            self._is_open, self._unread = True, self._unread[opening.end() :]
        found = _WHOLE.match(self._unread)
        if found is None:
            return ""
        self._unread = self._unread[found.end() :]
        return self._give(json.loads(f'"{found[0]}"', strict=False))

    def rest(self) -> str:
        """What the end of the arguments gives."""
        unread, self._unread = self._unread, ""
        if not self._is_open:
            return self._give(_plain(unread))
        if unread.startswith("\\") or _CLOSING.fullmatch(unread):
            return ""
        return self._give(unread)

    def _give(self, text: str) -> str:
        self._pieces.append(text)
        return text


def _plain(arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value.keys() == {FREEFORM_ARGUMENT}:
        return json.dumps(value[FREEFORM_ARGUMENT], ensure_ascii=False)
    return arguments
