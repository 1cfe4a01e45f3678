"""How calls are written, as data: what the grammars of calls are made from. Every tool format has its own."""

from __future__ import annotations

import msgspec

from vllm_mlx.chat.plain_tools import FREEFORM_ARGUMENT


class NamedArguments(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments that are written one by one, each under its name, instead of as one JSON object."""

    before: str
    """What stands before a value; `{key}` is its name, `{is_text}` 'true' where it is a text, else 'false'."""
    behind: str = ""
    separator: str = ""
    """Between two arguments."""
    text: tuple[str, str] | None = ("", "")
    """What stands around a text, which is written as it is; None: texts are JSON strings."""
    words: tuple[str, str, str] = ("true", "false", "null")
    frame: str = ""
    """What keeps the beginning and the end of a text from being taken for part of what stands around it."""
    keys_are_words: bool = False
    """Whether a name must be one of Python's; if one is not, the arguments are one JSON object."""


class CallSyntax(msgspec.Struct, frozen=True, kw_only=True):
    """Calls between fixed texts. Their arguments are one JSON object, or have names of their own."""

    mark: str = ""
    """What opens one call or several, and stands in no ordinary text; empty: the first call itself does."""
    before: str = ""
    """What may stand before the mark."""
    opening: str = ""
    """Between the mark and the first call."""
    head: str = '{"name": "{name}", "arguments": '
    """Before the arguments; `{name}` is the tool's name, and `{index}` any number."""
    other_head: str = ""
    """The same in another order, where there are two."""
    end: str = "}"
    """Behind the arguments."""
    between: str | None = None
    """Between two calls; None: there is only one."""
    closing: str = ""
    """Behind the last call."""
    no_calls: tuple[str, ...] = ()
    """What else may stand behind the mark: then it opens text."""
    is_message: bool = False
    """Whether a call is a message in a channel of its own, beside that of the answer."""
    template: str = ""
    """What the chat templates contain whose models write so, where a format has several ways."""
    arguments: NamedArguments | None = None
    """How arguments are written; None: as one JSON object."""
    raw: tuple[str, str] | None = None
    """What stands around the input of a freeform tool instead of a head, arguments and an end; None: see `ELEMENT`."""


ELEMENT = (f"<function={{name}}>\n<parameter={FREEFORM_ARGUMENT}>\n", "\n</parameter>\n</function>")
"""What stands around the input of a freeform tool, right behind the mark, where no grammar fits into its arguments."""
