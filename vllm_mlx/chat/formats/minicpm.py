"""MiniCPM 5: `<function name="f"><param name="k">v</param></function>`."""

from __future__ import annotations

from vllm_mlx.chat.call_syntax import CallSyntax, NamedArguments
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.elements import Elements, read_element
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_OPENER = "<function name="
_ELEMENTS = Elements(parameter="<param", parameter_end="</param>", guess=True)


def parse(reader: Reader, _opener: str, tools: ToolSet) -> Parsing[None]:
    """One call."""
    reader.give_back(" name=")
    yield from read_element(reader, tools, _ELEMENTS)


_SYNTAX = CallSyntax(
    mark=_OPENER,
    head='"{name}">',
    arguments=NamedArguments(before='<param name="{key}">', behind="</param>", frame="\n"),
    end="</function>",
    between=f"\n{_OPENER}",
)

FORMATS = (
    ToolFormat(
        name="minicpm5",
        openers=(_OPENER,),
        parse=parse,
        calls=(_SYNTAX,),
        signatures=("<param name=",),
        model_types=("minicpm",),
    ),
)
