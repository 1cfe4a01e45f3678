"""Grammars of tool calls in the syntax of a model's own family."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from vllm_mlx.chat.element_grammars import element_rules, free_value
from vllm_mlx.chat.plain_tools import FREEFORM_ARGUMENT, parameters_of
from vllm_mlx.chat.shapes import ANY_TEXT, schema_entry
from vllm_mlx.core.chat import Tool
from vllm_mlx.core.shape import OutputShape


class CallSyntax(msgspec.Struct, frozen=True, kw_only=True):
    """Calls between fixed texts, whose arguments are one JSON object, or elements with one argument each."""

    mark: str = ""
    """What opens one call or several, and stands in no ordinary text; empty: the first call itself does."""
    opening: str = ""
    """Between the mark and the first call."""
    head: str = '{"name": "{name}", "arguments": '
    """Before the arguments; `{name}` is the tool's name, and `{index}` any number."""
    end: str = "}"
    """Behind the arguments."""
    between: str | None = None
    """Between two calls; None: there is only one."""
    closing: str = ""
    """Behind the last call."""
    template: str = ""
    """What the chat templates contain whose models write so, where a format has several ways."""
    parameter: tuple[str, str] | None = None
    """What stands around each argument where they are elements; `{key}` is its name."""
    raw: tuple[str, str] | None = None
    """What stands around the input of a freeform tool that is written as it is; None: it must be a JSON string."""


_OBJECT_LIST = CallSyntax(opening="[", between=", ", closing="]")
_TAGGED = CallSyntax(
    mark="<tool_call>",
    opening="\n",
    between="\n</tool_call>\n<tool_call>\n",
    closing="\n</tool_call>",
    raw=(f"<function={{name}}>\n<parameter={FREEFORM_ARGUMENT}>\n", "\n</parameter>\n</function>"),
)
_DEEPSEEK = CallSyntax(
    mark="<｜tool▁calls▁begin｜>",
    opening="<｜tool▁call▁begin｜>",
    head="{name}<｜tool▁sep｜>",
    end="<｜tool▁call▁end｜>",
    between="<｜tool▁call▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
)
_QWEN = CallSyntax(
    mark="<tool_call>",
    opening="\n",
    head="<function={name}>\n",
    parameter=("<parameter={key}>\n", "\n</parameter>\n"),
    end="</function>",
    between=_TAGGED.between,
    closing=_TAGGED.closing,
    raw=_TAGGED.raw,
)
_GLM = CallSyntax(
    mark="<tool_call>",
    head="{name}\n",
    parameter=("<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n"),
    end="",
    between="</tool_call>\n<tool_call>",
    closing="</tool_call>",
)
_MINIMAX = CallSyntax(
    mark="<minimax:tool_call>",
    head='\n<invoke name="{name}">\n',
    parameter=('<parameter name="{key}">', "</parameter>\n"),
    end="</invoke>",
    between="",
    closing="\n</minimax:tool_call>",
)
_SEED = CallSyntax(
    mark="<seed:tool_call>",
    opening="\n",
    head="<function={name}>\n",
    parameter=("<parameter={key}>", "</parameter>\n"),
    end="</function>",
    between="\n</seed:tool_call>\n<seed:tool_call>\n",
    closing="\n</seed:tool_call>",
)
_replaced = msgspec.structs.replace
CALL_SYNTAXES = MappingProxyType(
    {
        "hermes": (_TAGGED,),
        "auto": (_TAGGED,),
        "qwen3_xml": (_QWEN,),
        "glm47": (_GLM,),
        "minimax": (_MINIMAX,),
        "seed_oss": (_SEED,),
        "llama": (CallSyntax(head='{"name": "{name}", "parameters": '),),
        "json": (CallSyntax(),),
        "xlam": (_OBJECT_LIST,),
        "mistral": (
            CallSyntax(mark="[TOOL_CALLS]", head="{name}[ARGS]", end="", between="[TOOL_CALLS]", template="[ARGS]"),
            _replaced(_OBJECT_LIST, mark="[TOOL_CALLS]"),
        ),
        "granite": (_replaced(_OBJECT_LIST, mark="<|tool_call|>"),),
        "phi4": (_replaced(_OBJECT_LIST, mark="<|tool_call|>", closing="]<|/tool_call|>"),),
        "jamba": (_replaced(_OBJECT_LIST, mark="<tool_calls>", closing="]</tool_calls>"),),
        "gigachat3": (CallSyntax(mark="<|function_call|>"),),
        "internlm": (
            CallSyntax(
                mark="<|action_start|><|plugin|>",
                opening="\n",
                head='{"name": "{name}", "parameters": ',
                closing="<|action_end|>",
            ),
        ),
        "cohere": (
            CallSyntax(
                mark="<|START_ACTION|>",
                opening="[\n    ",
                head='{"tool_call_id": "{index}", "tool_name": "{name}", "parameters": ',
                between=",\n    ",
                closing="\n]<|END_ACTION|>",
            ),
        ),
        "longcat": (
            CallSyntax(
                mark="<longcat_tool_call>",
                opening="\n",
                between="\n</longcat_tool_call>\n<longcat_tool_call>\n",
                closing="\n</longcat_tool_call>",
            ),
        ),
        "kimi": (
            CallSyntax(
                mark="<|tool_calls_section_begin|>",
                opening="<|tool_call_begin|>",
                head="functions.{name}:{index}<|tool_call_argument_begin|>",
                end="<|tool_call_end|>",
                between="<|tool_call_begin|>",
                closing="<|tool_calls_section_end|>",
            ),
        ),
        "deepseek": (
            _replaced(
                _DEEPSEEK,
                head="function<｜tool▁sep｜>{name}\n```json\n",
                end="\n```<｜tool▁call▁end｜>",
                template="```json",
            ),
            _DEEPSEEK,
        ),
    }
)
"""By the name of the tool format, the more particular first."""
_SAYS_NOTHING = frozenset(("$schema", "description", "title", "type"))
"""Keywords that describe no argument; those below describe none where they are empty."""
_LISTS = frozenset(("$defs", "properties", "required"))
_INDEX = "/[0-9]{1,2}/"


def call_syntax(form: str, template: str) -> CallSyntax | None:
    """How models with this tool format and chat template write calls; None if no grammar is known."""
    return next((syntax for syntax in CALL_SYNTAXES.get(form, ()) if syntax.template in template), None)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema that a tool's arguments are held to: always an object."""
    schema = {"type": "object", **parameters_of(tool)}
    if not {keyword for keyword, value in schema.items() if value or keyword not in _LISTS} - _SAYS_NOTHING:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if tool.syntax is None or tool.syntax.kind != "regex":
        return schema
    text = {"type": "string", "pattern": f"^(?:{tool.syntax.value})$"}
    return {**schema, "properties": {FREEFORM_ARGUMENT: text}, "additionalProperties": False}


def raw_input_name(tool: Tool) -> str:
    """What the grammar of a freeform tool's input is called among the others."""
    return f"input_of_{hashlib.sha256(tool.name.encode()).hexdigest()[:16]}"


def call_rules(
    tools: Sequence[Tool], syntax: CallSyntax, *, literal: Callable[[str], str], is_parallel: bool
) -> list[str]:
    """Lark rules; `calls` is one call or several, `lazy_calls` any text in which calls have their form.

    They refer to `raw_input_name` of every tool that has a `raw_input`.
    """

    def fixed(text: str) -> str:
        return literal(text) if text else ""

    each = [rule for i, tool in enumerate(tools) for rule in _call(f"call{i}", tool, syntax, fixed)]
    if syntax.parameter is not None:
        each.append(free_value(fixed(syntax.parameter[1])))
    either = " | ".join(f"call{i}" for i in range(len(tools)))
    more = f" ({fixed(syntax.between)} call)*" if is_parallel and syntax.between is not None else ""
    mark = fixed(syntax.mark)
    inside = f"inside: {fixed(syntax.opening)} call{more} {fixed(syntax.closing)}"
    rules = [f"calls: {mark} inside", inside, f"call: {either}", *each]
    if mark.startswith("<["):
        rules.append(f"lazy_calls: (TEXT {mark} inside)* TEXT")
    elif mark:
        rules += [f"head[lazy]: TEXT {mark}", "lazy_calls: (head inside)* TEXT"]
    return rules


def tool_grammar(start: str, rules: Sequence[str]) -> str:
    """One Lark grammar of a start rule, which may bring the rule of free text along, and of others."""
    text = [] if "TEXT:" in start else [f"TEXT: {ANY_TEXT}"]
    return "\n".join([start, *rules, *text])


def raw_input(tool: Tool, syntax: CallSyntax) -> OutputShape | None:
    """What a tool's input must look like where it is written as it is, in a grammar of its own; else None."""
    return tool.syntax if syntax.raw is not None else None


def _call(rule: str, tool: Tool, syntax: CallSyntax, fixed: Callable[[str], str]) -> list[str]:
    """The rule of calls of one tool, and those that it needs."""
    if syntax.raw is not None and raw_input(tool, syntax) is not None:
        before, behind = syntax.raw
        return [f"{rule}: {fixed(before.replace('{name}', tool.name))} @{raw_input_name(tool)} {fixed(behind)}"]
    head = f" {_INDEX} ".join(fixed(part.replace("{name}", tool.name)) for part in syntax.head.split("{index}"))
    schema = arguments_schema(tool)
    more: list[str] = []
    if syntax.parameter is not None:
        param = f"tools.{tool.name}.parameters"
        arguments, more = element_rules(
            schema, syntax.parameter, prefix=rule, fixed=fixed, param=param, is_strict=tool.is_strict
        )
    else:
        whole = schema_entry(schema, is_strict=tool.is_strict, param="parameters")["json_schema"]
        arguments = f"%json {json.dumps(whole)}"
    return [f"{rule}: {head} {arguments} {fixed(syntax.end)}", *more]
