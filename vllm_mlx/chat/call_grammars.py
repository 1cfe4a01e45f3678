"""Grammars of tool calls in the syntax of a model's own family."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_mlx.chat.argument_grammars import ArgumentRules, free_text
from vllm_mlx.chat.call_syntax import ELEMENT, CallSyntax
from vllm_mlx.chat.lark import ANY, Literal, has_tokens, in_regex, up_to
from vllm_mlx.chat.payloads.tools import resolved
from vllm_mlx.chat.plain_tools import FREEFORM_ARGUMENT, parameters_of
from vllm_mlx.chat.shapes import schema_entry
from vllm_mlx.core.chat import Tool
from vllm_mlx.core.errors import InvalidRequest

_SAYS_NOTHING = frozenset(("$schema", "description", "title", "type"))
"""Keywords that describe no argument; those below describe none where they are empty."""
_LISTS = frozenset(("$defs", "properties", "required"))
_INDEX = "/[0-9]{1,2}/"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema that a tool's arguments are held to: always an object.

    Raises:
        InvalidRequest: the tool's own schema allows no object.
    """
    given = parameters_of(tool)
    schema = {**given, **(resolved(given, given) if "$ref" in given else {})}
    schema.pop("$ref", None)
    kinds = schema.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        param = f"tools.{tool.name}.parameters.type"
        raise InvalidRequest(f"{param} must be 'object': arguments are a JSON object.", param=param)
    schema = {**schema, "type": "object"}
    if not {keyword for keyword, value in schema.items() if value or keyword not in _LISTS} - _SAYS_NOTHING:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if tool.syntax is None or tool.syntax.kind != "regex":
        return schema
    text = {"type": "string", "pattern": f"^(?:{tool.syntax.value})$"}
    return {**schema, "properties": {FREEFORM_ARGUMENT: text}, "additionalProperties": False}


def input_name(tool: Tool) -> str:
    """What the grammar of a freeform tool's input is called among the others."""
    return f"input_of_{hashlib.sha256(tool.name.encode()).hexdigest()[:16]}"


def input_around(tool: Tool, syntax: CallSyntax) -> tuple[str, str] | None:
    """What stands around a freeform tool's input that is written as it is; None if it is part of JSON."""
    if tool.syntax is None:
        return None
    if syntax.raw is not None:
        return _named(syntax.raw, tool)
    named = syntax.arguments
    if named is not None and named.text is not None:
        before = named.before.replace("{key}", FREEFORM_ARGUMENT).replace("{is_text}", "true") + named.text[0]
        head, end = syntax.head + before + named.frame, named.frame + named.text[1] + named.behind + syntax.end
        return _named((head, end), tool)
    return None if tool.syntax.kind == "regex" else _named(ELEMENT, tool)


def is_element(tool: Tool, syntax: CallSyntax) -> bool:
    """Whether a freeform tool is called by an element, since the model's own syntax has no place for its grammar."""
    return syntax.raw is None and _has_element(tool, syntax)


def _has_element(tool: Tool, syntax: CallSyntax) -> bool:
    """Whether a freeform tool's call has an element, be it the model's own or not."""
    return input_around(tool, syntax) == _named(ELEMENT, tool)


class CallRules(msgspec.Struct, frozen=True, kw_only=True):
    """Writes calls of some tools as rules of a Lark grammar.

    They refer to `input_name` of every tool that has something `input_around` it.
    """

    tools: Sequence[Tool]
    syntax: CallSyntax
    fixed: Literal
    is_parallel: bool
    """Whether there may be several calls."""
    takes_json: bool
    """Whether a freeform tool may be called as models were taught to, too, where that has no place for its grammar."""

    def write(self) -> list[str]:
        """`calls` is one call or several, `lazy_calls` any text in which calls have their form.

        Raises:
            InvalidRequest: a strict schema cannot be enforced in this syntax; `param` names it.
        """
        syntax, native = self.syntax, self._native()
        rules = [rule for i in range(len(self.tools)) for rule in self._call(i)]
        plain = [f"call{i}" for i in native]
        if self.takes_json and syntax.mark:
            elements = [i for i, tool in enumerate(self.tools) if _has_element(tool, syntax)]
            rules += [rule for i in elements for rule in self._plain_call(f"plain{i}", i)]
            plain += [f"plain{i}" for i in elements]
        if syntax.arguments is not None:
            rules += free_text(syntax.arguments, self.fixed)
        if plain:
            rules += [f"call: {' | '.join(plain)}", f"more: {self._more()}"]
            rules.append(f"native: {self.fixed(syntax.opening)} call more")
        either = [*(["native"] if plain else []), *(f"call{i}" for i in range(len(self.tools)) if i not in native)]
        before = f"({self.fixed(syntax.before)})?" if syntax.before else ""
        several = "+" if self._may_repeat and either != ["native"] else ""
        rules += [f"calls: section{several}", f"section: {before} {self.fixed(syntax.mark)} inside"]
        return [*rules, f"inside: {' | '.join(either)}", *(self._behind_mark() if syntax.mark else self._triggered())]

    @property
    def _may_repeat(self) -> bool:
        return self.is_parallel and self.syntax.between is not None

    def _native(self) -> list[int]:
        """The tools that are called in the model's own syntax."""
        return [i for i, tool in enumerate(self.tools) if not is_element(tool, self.syntax)]

    def _more(self) -> str:
        """Behind the first call."""
        between = self.fixed(self.syntax.between or "")
        return (
            f"({between} call)* {self.fixed(self.syntax.closing)}"
            if self._may_repeat
            else self.fixed(self.syntax.closing)
        )

    def _call(self, i: int) -> list[str]:
        """The rule of calls of one tool, and those that it needs."""
        tool, syntax = self.tools[i], self.syntax
        if (around := input_around(tool, syntax)) is not None:
            behind = f"@{input_name(tool)} {self.fixed(around[1])}"
            return [f"call{i}: {self.fixed(around[0])} rest{i}", f"rest{i}: {behind}"]
        return self._plain_call(f"call{i}", i)

    def _plain_call(self, rule: str, i: int) -> list[str]:
        """The rule of calls of a tool with its arguments, and those that it needs."""
        tool, syntax = self.tools[i], self.syntax
        heads = " | ".join(self._head(head, tool) for head in (syntax.head, syntax.other_head) if head)
        arguments, rules = self._arguments(i)
        rest = f"rest{i}" if rule == f"call{i}" else f"{rule}_rest"
        return [f"{rule}: ({heads}) {rest}", f"{rest}: {arguments} {self.fixed(syntax.end)}", *rules]

    def _head(self, head: str, tool: Tool) -> str:
        return f" {_INDEX} ".join(self.fixed(part.replace("{name}", tool.name)) for part in head.split("{index}"))

    def _arguments(self, i: int) -> tuple[str, list[str]]:
        tool, schema = self.tools[i], arguments_schema(self.tools[i])
        param = f"tools.{tool.name}.parameters"
        if self.syntax.arguments is None:
            whole = schema_entry(schema, is_strict=tool.is_strict, param=param, has_escapes=True)["json_schema"]
            return f"%json {json.dumps(whole)}", []
        rules = ArgumentRules(
            schema=schema,
            named=self.syntax.arguments,
            rule=f"call{i}",
            fixed=self.fixed,
            param=param,
            is_strict=tool.is_strict,
        )
        return rules.write()

    def _behind_mark(self) -> list[str]:
        """Text is free until the mark."""
        syntax = self.syntax
        inside = " | ".join(["inside", *map(self.fixed, syntax.no_calls)])
        if not syntax.before:
            return [*up_to("marked", self.fixed(syntax.mark)), f"lazy_calls: (marked ({inside}))* TEXT"]
        marked = up_to("marked", self.fixed(syntax.mark))
        framed = up_to("framed", self.fixed(syntax.before + syntax.mark))
        return [*marked, *framed, f"lazy_calls: ((marked | framed) ({inside}))* TEXT"]

    def _triggered(self) -> list[str]:
        """Text is free until a call of a tool begins as calls of that tool do."""
        rules, either, native = [], [], self._native()
        for i, tool in enumerate(self.tools):
            around = input_around(tool, self.syntax)
            heads = [around[0]] if around else [self.syntax.head.replace("{name}", tool.name)]
            if self.syntax.other_head and not around:
                heads.append(self.syntax.other_head.replace("{name}", tool.name))
            for j, head in enumerate(heads):
                rules += self._trigger(f"trigger{i}_{j}", self.syntax.opening + head if i in native else head)
                space = '" "?' if head.endswith(" ") else ""
                either.append(f"trigger{i}_{j} {space} rest{i}" + (" more" if i in native else ""))
        return [*rules, f"lazy_calls: ({' | '.join(either)})* TEXT"]

    def _trigger(self, rule: str, text: str) -> list[str]:
        """A text up to and with this one; where that has white space, any will do."""
        if has_tokens(self.fixed(text)):
            return up_to(rule, self.fixed(text.rstrip(" ")))
        loose = r"[ \n]*".join(map(in_regex, text.rstrip(" ").split(" ")))
        return [f"{rule}[lazy]: /{ANY}{loose}/"]


def _named(around: tuple[str, str], tool: Tool) -> tuple[str, str]:
    return around[0].replace("{name}", tool.name), around[1]
