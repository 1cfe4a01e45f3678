"""Llama 3.x: a bare JSON object, or one behind `<|python_tag|>`; several with `;` between."""

from __future__ import annotations

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.objects import ObjectRules, read_marked_objects
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tagged import FUNCTION, read_tagged
from vllm_mlx.chat.payloads.tools import ToolSet

_TAG = "<|python_tag|>"
_MARKED = ObjectRules(needs_arguments=True)
_BARE = ObjectRules(needs_arguments=True, needs_known_name=True)


def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """Objects; a bare one must name a tool of the request."""
    if opener == FUNCTION:
        yield from read_tagged(reader, opener, tools)
    elif opener == _TAG:
        yield from read_marked_objects(reader, tools, _MARKED, ends=("<|eom_id|>",))
    else:
        reader.give_back(opener)
        yield from read_marked_objects(reader, tools, _BARE)


FORMATS = (
    ToolFormat(
        name="llama",
        aliases=("llama3", "llama4", "llama3_json", "llama4_json"),
        openers=(_TAG, "{", FUNCTION),
        parse=parse,
        calls=(CallSyntax(head='{"name": "{name}", "parameters": '),),
        dropped=("<|eom_id|>", "<|eot_id|>"),
        is_marked=False,
        signatures=("<|python_tag|>",),
        model_types=("llama",),
    ),
    ToolFormat(name="json", openers=("{", "["), parse=parse, calls=(CallSyntax(),), is_marked=False),
)
