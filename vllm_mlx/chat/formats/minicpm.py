"""MiniCPM 5: `<function name="f"><param name="k">v</param></function>`."""

from __future__ import annotations

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


FORMATS = (
    ToolFormat(
        name="minicpm5", openers=(_OPENER,), parse=parse, signatures=("<param name=",), model_types=("minicpm",)
    ),
)
