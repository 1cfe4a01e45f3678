"""Calls as Python: Llama 3.2 and 4, Olmo 3, LFM2."""

from __future__ import annotations

from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.pythonic import emit_calls, read_call_list
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
    text, _ = yield from reader.until(_ENDS[opener])
    yield from emit_calls(text, tools)


FORMATS = (
    ToolFormat(
        name="pythonic",
        aliases=("llama4_pythonic", "llama3_pythonic"),
        openers=("[",),
        parse=parse,
        dropped=("<|python_start|>", "<|python_end|>", "<|eom_id|>", "<|eot_id|>"),
        is_marked=False,
        signatures=("<|python_start|>",),
        model_types=("llama4",),
    ),
    ToolFormat(
        name="olmo3",
        openers=("<function_calls>",),
        parse=parse,
        signatures=("<function_calls>",),
        model_types=("olmo3",),
    ),
    ToolFormat(
        name="lfm2",
        openers=("<|tool_call_start|>",),
        parse=parse,
        signatures=("<|tool_call_start|>",),
        model_types=("lfm2", "lfm2_moe"),
    ),
)
