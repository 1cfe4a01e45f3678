"""The text of a freeform tool, read out of the JSON arguments that carry it, as they come."""

from __future__ import annotations

import json
import re

from vllm_mlx.chat.plain_tools import FREEFORM_ARGUMENT

_OPENING = re.compile(r'\s*\{\s*"' + re.escape(FREEFORM_ARGUMENT) + r'"\s*:\s*"')
_HIGH = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_LOW = r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_WHOLE = re.compile(rf'(?:[^"\\]+|\\["\\/bfnrt]|{_HIGH}{_LOW}|(?!{_HIGH})\\u[0-9a-fA-F]{{4}})+')
"""Characters of a JSON string that are complete: the end of what is there may be half of one."""
_CLOSING = re.compile(r'(?:"\s*\}?\s*)?')


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
