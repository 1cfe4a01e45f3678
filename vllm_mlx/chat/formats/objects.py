"""JSON objects between marks of their own: Granite, Phi-4, Jamba, Hunyuan, InternLM, Command-R, xLAM and others."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.objects import ObjectRules, read_marked_objects
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_BARE = ("[", "{")
_COHERE_MARKS = (
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    "<|END_OF_TURN_TOKEN|>",
)


def _parser(*ends: str, needs_arguments: bool = False) -> Callable[[Reader, str, ToolSet], Parsing[None]]:
    """Objects up to and with one of some ends; those that nothing marks must name a tool of the request."""
    marked = ObjectRules(needs_arguments=needs_arguments)
    bare = ObjectRules(needs_arguments=True, needs_known_name=True)

    def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
        if opener[-1] in _BARE:
            reader.give_back(opener[-1])
        is_bare = opener in _BARE or opener.startswith("```")
        yield from read_marked_objects(reader, tools, bare if is_bare else marked, ends=ends)

    return parse


_LIST = CallSyntax(opening="[", between=", ", closing="]")


def _list_behind(mark: str, closing: str = "]") -> tuple[CallSyntax]:
    return (msgspec.structs.replace(_LIST, mark=mark, closing=closing),)


_INTERNLM = CallSyntax(
    mark="<|action_start|><|plugin|>",
    opening="\n",
    head='{"name": "{name}", "parameters": ',
    closing="<|action_end|>",
)
_COHERE = CallSyntax(
    mark="<|START_ACTION|>",
    opening="[\n    ",
    head='{"tool_call_id": "{index}", "tool_name": "{name}", "parameters": ',
    between=",\n    ",
    closing="\n]<|END_ACTION|>",
)
_INKLING = CallSyntax(
    mark="<|content_invoke_tool_json|>",
    head='{"name": "{name}", "args": ',
    between="<|end_message|><|message_model|><|content_invoke_tool_json|>",
    closing="<|end_message|>",
)

FORMATS = (
    ToolFormat(
        name="granite",
        aliases=("granite3", "granite-20b-fc"),
        openers=("<|tool_call|>", "<tool_call>", "<function_call>"),
        parse=_parser("</tool_call>"),
        calls=_list_behind("<|tool_call|>"),
        signatures=("<|tool_call|>",),
        model_types=("granite", "granitemoe", "granitemoehybrid"),
    ),
    ToolFormat(
        name="phi4",
        aliases=("phi4_mini_json", "phi4_mini"),
        openers=("functools[", "<|tool_call|>"),
        parse=_parser("<|/tool_call|>"),
        calls=_list_behind("<|tool_call|>", "]<|/tool_call|>"),
        signatures=("<|tool|>",),
        model_types=("phi4",),
    ),
    ToolFormat(
        name="jamba",
        aliases=("hunyuan_a13b", "hunyuan"),
        openers=("<tool_calls>",),
        parse=_parser("</tool_calls>"),
        calls=_list_behind("<tool_calls>", "]</tool_calls>"),
        dropped=("<answer>", "</answer>"),
        signatures=("<tool_calls>",),
        model_types=("jamba", "hunyuan", "hunyuan_v1_dense", "hunyuan_v1_moe"),
    ),
    ToolFormat(
        name="internlm",
        openers=("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"),
        parse=_parser("<|action_end|>"),
        calls=(_INTERNLM,),
        signatures=("<|plugin|>",),
        model_types=("internlm2", "internlm3"),
    ),
    ToolFormat(
        name="cohere",
        aliases=("command_r", "command_a", "command_r7b"),
        openers=("<|START_ACTION|>",),
        parse=_parser("<|END_ACTION|>"),
        calls=(_COHERE,),
        dropped=_COHERE_MARKS,
        signatures=("<|START_ACTION|>",),
        model_types=("cohere", "cohere2"),
    ),
    ToolFormat(
        name="xlam",
        openers=("[TOOL_CALLS]", "<tool_call>", "```json\n[", "```json\n{", "```\n[", "```\n{", "[", "{"),
        parse=_parser("```", "</tool_call>"),
        calls=(_LIST,),
        is_marked=False,
        model_types=("xlam",),
    ),
    ToolFormat(
        name="gigachat3",
        openers=("<|function_call|>", "<|message_sep|>\n\nfunction call<|role_sep|>\n"),
        parse=_parser("</s>"),
        calls=(CallSyntax(mark="<|function_call|>"),),
        dropped=("</s>",),
        signatures=("function call<|role_sep|>",),
    ),
    ToolFormat(
        name="inkling",
        openers=("<|content_invoke_tool_json|>",),
        parse=_parser("<|end_message|>"),
        calls=(_INKLING,),
        dropped=("<|content_text|>", "<|end_message|>", "<|message_model|>"),
        signatures=("<|content_invoke_tool_json|>",),
    ),
)
