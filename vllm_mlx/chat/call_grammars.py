"""Grammars of tool calls in the syntax of a model's own family."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from vllm_mlx.chat.plain_tools import parameters_of
from vllm_mlx.chat.shapes import ANY_TEXT, quoted, schema_entry
from vllm_mlx.core.chat import Tool


class CallSyntax(msgspec.Struct, frozen=True):
    """A call as one JSON object between marks."""

    mark: str = ""
    """What opens a call and stands in no ordinary text; empty: the object itself does."""
    before: str = ""
    """Between the mark and the object."""
    after: str = ""
    arguments: str = "arguments"
    """The key of the arguments."""
    between: str | None = None
    """Between two calls; None: there is only one."""


_TAGGED = CallSyntax("<tool_call>", "\n", "\n</tool_call>", between="\n")
CALL_SYNTAXES = MappingProxyType(
    {
        "hermes": _TAGGED,
        "auto": _TAGGED,
        "llama": CallSyntax(arguments="parameters"),
        "json": CallSyntax(),
    }
)
"""By the name of the tool format."""


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema that a tool's arguments are held to: always an object."""
    return {"type": "object", **parameters_of(tool)}


def call_rules(
    tools: Sequence[Tool], syntax: CallSyntax, *, literal: Callable[[str], str], is_parallel: bool
) -> list[str]:
    """Lark rules; `calls` is one call or several, `lazy_calls` any text in which calls have their form."""
    objects = [f"call{i}: {_object(tool, syntax)}" for i, tool in enumerate(tools)]
    either = " | ".join(f"call{i}" for i in range(len(tools)))
    before = literal(syntax.before) if syntax.before else ""
    after = literal(syntax.after) if syntax.after else ""
    mark = literal(syntax.mark) if syntax.mark else ""
    more = f" ({quoted(syntax.between)} call)*" if is_parallel and syntax.between is not None else ""
    rules = [f"calls: call{more}", f"call: {mark} inside", f"inside: {before} ({either}) {after}", *objects]
    if mark.startswith("<["):
        rules.append(f"lazy_calls: (TEXT {mark} inside)* TEXT")
    elif mark:
        rules += [f"head[lazy]: TEXT {mark}", "lazy_calls: (head inside)* TEXT"]
    return rules


def tool_grammar(start: str, rules: Sequence[str]) -> str:
    """One Lark grammar of a start rule, which may bring the rule of free text along, and of others."""
    text = [] if "TEXT:" in start else [f"TEXT: {ANY_TEXT}"]
    return "\n".join([start, *rules, *text])


def _object(tool: Tool, syntax: CallSyntax) -> str:
    head = f'{{"name": {json.dumps(tool.name)}, {json.dumps(syntax.arguments)}: '
    schema = schema_entry(arguments_schema(tool), is_strict=tool.is_strict, param="parameters")["json_schema"]
    return f"{quoted(head)} %json {json.dumps(schema)} {quoted('}')}"
