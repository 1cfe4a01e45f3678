"""Calls as Python: Llama 3.2 and 4, Olmo 3, LFM2."""

from __future__ import annotations

import msgspec

from vllm_mlx.chat.call_syntax import CallSyntax, NamedArguments
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.pythonic import read_call_list, read_calls_before
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_ENDS = {
    "<function_calls>": "</function_calls>",
    "<|tool_call_start|>": "<|tool_call_end|>",
}


def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """A list of calls, or all that stands between two marks."""
    if opener == "[":
        yield from read_call_list(reader, tools)
        return
    yield from read_calls_before(reader, tools, _ENDS[opener])


_LIST = CallSyntax(
    opening="[",
    head="{name}(",
    arguments=NamedArguments(
        before="{key}=", separator=", ", text=None, words=("True", "False", "None"), keys_are_words=True
    ),
    end=")",
    between=", ",
    closing="]",
)
_OLMO = msgspec.structs.replace(_LIST, mark="<function_calls>", opening="", between="\n", closing="</function_calls>")
_LFM = msgspec.structs.replace(_LIST, mark="<|tool_call_start|>", closing="]<|tool_call_end|>")

FORMATS = (
    ToolFormat(
        name="pythonic",
        aliases=("llama4_pythonic", "llama3_pythonic"),
        openers=("[",),
        parse=parse,
        calls=(_LIST,),
        dropped=("<|python_start|>", "<|python_end|>", "<|eom_id|>", "<|eot_id|>"),
        is_marked=False,
        signatures=("<|python_start|>",),
        model_types=("llama4",),
    ),
    ToolFormat(
        name="olmo3",
        openers=("<function_calls>",),
        parse=parse,
        calls=(_OLMO,),
        signatures=("<function_calls>",),
        model_types=("olmo3",),
    ),
    ToolFormat(
        name="lfm2",
        openers=("<|tool_call_start|>",),
        parse=parse,
        calls=(_LFM,),
        signatures=("<|tool_call_start|>",),
        model_types=("lfm2", "lfm2_moe"),
    ),
)
