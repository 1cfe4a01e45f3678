"""A name, then keys and values in tags: Poolside, LongCat, Hunyuan V3, K2 Horizon. GLM is in `hermes.py`."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vllm_mlx.chat.call_syntax import CallSyntax, NamedArguments
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.elements import Pairs, read_pairs
from vllm_mlx.chat.payloads.objects import ObjectRules, read_marked_objects
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet


def _parser(
    pairs: Pairs, call: str, section: str = "", section_end: str = ""
) -> Callable[[Reader, str, ToolSet], Parsing[None]]:
    """One call, or a section of them; a call may also be JSON."""

    def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
        if opener == section:
            yield from reader.space()
            yield from reader.expect(call)
        while True:
            yield from reader.space()
            if (yield from reader.peek()) in ("{", "["):
                yield from read_marked_objects(reader, tools, ObjectRules(), ends=(pairs.end,))
            else:
                yield from read_pairs(reader, tools, pairs)
            if not section:
                return
            yield from reader.space()
            if (yield from reader.accept(call, section_end)) != call:
                return

    return parse


_LONGCAT = Pairs(
    key="<longcat_arg_key>",
    key_end="</longcat_arg_key>",
    value="<longcat_arg_value>",
    value_end="</longcat_arg_value>",
    end="</longcat_tool_call>",
)
_HORIZON = Pairs(
    key="<ifm|arg_key>",
    key_end="</ifm|arg_key>",
    value="<ifm|arg_value>",
    value_end="</ifm|arg_value>",
    end="</ifm|tool_call>",
    kind="<ifm|arg_type>",
    kind_end="</ifm|arg_type>",
)


def _syntax(pairs: Pairs, mark: str, head: str = "{name}\n") -> CallSyntax:
    """One call behind each mark."""
    arguments = NamedArguments(
        before=f"{pairs.key}{{key}}{pairs.key_end}\n{pairs.value}",
        behind=f"{pairs.value_end}\n",
        frame="" if pairs.keeps_space else "\n",
    )
    return CallSyntax(
        mark=mark, head=head, arguments=arguments, end="", between=f"{pairs.end}\n{mark}", closing=pairs.end
    )


def _in_section(syntax: CallSyntax, section: str, section_end: str) -> CallSyntax:
    """The same in a section of their own."""
    end = f"{syntax.closing}{section_end}"
    return msgspec.structs.replace(syntax, mark=section, opening=syntax.mark, closing=end)


_POOLSIDE = Pairs(keeps_space=True)
_HUNYUAN = Pairs(separator="<tool_sep>")
_LONGCAT_SYNTAX = CallSyntax(
    mark="<longcat_tool_call>",
    opening="\n",
    between="\n</longcat_tool_call>\n<longcat_tool_call>\n",
    closing="\n</longcat_tool_call>",
)

FORMATS = (
    ToolFormat(
        name="poolside_v1",
        aliases=("poolside", "laguna"),
        openers=("<tool_call>",),
        parse=_parser(_POOLSIDE, "<tool_call>"),
        calls=(_syntax(_POOLSIDE, "<tool_call>"),),
        model_types=("laguna",),
    ),
    ToolFormat(
        name="longcat",
        openers=("<longcat_tool_call>",),
        parse=_parser(_LONGCAT, "<longcat_tool_call>"),
        calls=(_LONGCAT_SYNTAX,),
        signatures=("<longcat_tool_call>",),
        model_types=("longcat_flash",),
    ),
    ToolFormat(
        name="hy_v3",
        openers=("<tool_calls>",),
        parse=_parser(_HUNYUAN, "<tool_call>", "<tool_calls>", "</tool_calls>"),
        calls=(_in_section(_syntax(_HUNYUAN, "<tool_call>", "{name}<tool_sep>\n"), "<tool_calls>", "\n</tool_calls>"),),
        signatures=("<tool_calls>", "<tool_sep>"),
    ),
    ToolFormat(
        name="k2_horizon",
        openers=("<ifm|tool_calls>",),
        parse=_parser(_HORIZON, "<ifm|tool_call>", "<ifm|tool_calls>", "</ifm|tool_calls>"),
        calls=(_in_section(_syntax(_HORIZON, "<ifm|tool_call>"), "<ifm|tool_calls>", "\n</ifm|tool_calls>"),),
        signatures=("<ifm|tool_call",),
    ),
)
