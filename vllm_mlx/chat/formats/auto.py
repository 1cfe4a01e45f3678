"""When nothing is known of the model: every way to write a call that no other text looks like."""

from __future__ import annotations

from vllm_mlx.chat.formats import ToolFormat, dsml, gemma, harmony, hermes, invoke, kimi, llama, mistral
from vllm_mlx.chat.payloads.actions import NotACall, Parsing
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tagged import read_bracket
from vllm_mlx.chat.payloads.tools import ToolSet

_BRACKET = "["
_ALL = (
    *(*gemma.FORMATS, *dsml.FORMATS, *mistral.FORMATS, *kimi.FORMATS, *invoke.FORMATS, *harmony.FORMATS),
    *(hermes.FORMATS[0], llama.FORMATS[0]),
)


def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """Whatever the opener begins."""
    if opener != _BRACKET:
        form = next(form for form in _ALL if opener in form.openers)
        yield from form.parse(reader, opener, tools)
        return
    if (yield from reader.peek()) == "{":
        yield from llama.parse(reader, opener, tools)
        return
    yield from _bare_bracket(reader, tools)


def _bare_bracket(reader: Reader, tools: ToolSet) -> Parsing[None]:
    """`[f({...})]`; without known tools it would be any list."""
    if not tools.schemas and (yield from reader.peek()) in ("", " "):
        raise NotACall("a list of something else")
    yield from read_bracket(reader, end=")]")


FORMATS = (
    ToolFormat(
        name="auto",
        aliases=("generic",),
        openers=(*dict.fromkeys(opener for form in _ALL for opener in form.openers), _BRACKET),
        parse=parse,
        calls=hermes.FORMATS[0].calls,
        dropped=tuple(dict.fromkeys(mark for form in _ALL for mark in form.dropped)),
        is_marked=False,
    ),
)
