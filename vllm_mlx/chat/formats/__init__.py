"""How model families write tool calls: one module per format, each with its `FORMATS`, found by looking in here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

import msgspec

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tagged import FUNCTION, read_tagged
from vllm_mlx.chat.payloads.tools import ToolSet

Parse = Callable[[Reader, str, ToolSet], Parsing[None]]
"""Reads a call, or several, from behind the opener that was found. Raises NotACall; keeps nothing."""


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """One way to write calls."""

    name: str
    aliases: tuple[str, ...] = ()
    openers: tuple[str, ...]
    """What a call may begin with. Where they turn out not to begin one, they are text."""
    parse: Parse
    calls: tuple[CallSyntax, ...]
    """How its calls are written where they are guaranteed; of several, the first whose template it is."""
    dropped: tuple[str, ...] = ()
    """Marks around the answer that are not part of it."""
    is_marked: bool = True
    """Whether the openers stand in no ordinary text; only then do they count inside reasoning."""
    signatures: tuple[str, ...] = ()
    """Texts that chat templates of these models contain, all of them."""
    model_types: tuple[str, ...] = ()
    """Values of `model_type` that write so whatever the template says."""
    has_short_ids: bool = False
    """Whether ids of calls must be nine letters or digits."""

    def syntax(self, template: str) -> CallSyntax:
        """How models with this chat template write calls."""
        return next((syntax for syntax in self.calls if syntax.template in template), self.calls[-1])


def with_elements(form: ToolFormat) -> ToolFormat:
    """The format whose freeform tools may also be called by an element; see `call_syntax.ELEMENT`."""

    def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
        if opener == FUNCTION or (yield from reader.accept(FUNCTION)):
            yield from read_tagged(reader, FUNCTION, tools)
        else:
            yield from form.parse(reader, opener, tools)

    return msgspec.structs.replace(form, openers=(*form.openers, FUNCTION), parse=parse)


@cache
def tool_formats() -> tuple[ToolFormat, ...]:
    """All formats, by module and in the order of the modules' `FORMATS`."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(form for module in modules for form in module.FORMATS)


def tool_format(name: str) -> ToolFormat:
    """The format of a name or alias. Raises KeyError."""
    return _by_name()[name.lower()]


def tool_format_names() -> tuple[str, ...]:
    """All names and aliases, sorted."""
    return tuple(sorted(_by_name()))


@cache
def _by_name() -> dict[str, ToolFormat]:
    return {name: form for form in tool_formats() for name in (form.name, *form.aliases)}
