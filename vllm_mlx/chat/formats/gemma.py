"""Gemma 4 and FunctionGemma: `call:f{key:value}` with quotes of their own."""

from __future__ import annotations

from vllm_mlx.chat.call_syntax import CallSyntax, NamedArguments
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.bare_words import BareWords, read_bare_calls
from vllm_mlx.chat.payloads.pythonic import emit_calls
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_CODE = "```tool_code"
_FUNCTION_GEMMA = BareWords(quote="<escape>", end="<end_function_call>")
_GEMMA4 = BareWords()


def parse_gemma4(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """A block of calls, or Python in a fence."""
    if opener == _CODE:
        text, _ = yield from reader.until("```")
        yield from emit_calls(text, tools)
        return
    yield from read_bare_calls(reader, _GEMMA4)


def parse_function_gemma(reader: Reader, _opener: str, _tools: ToolSet) -> Parsing[None]:
    """A block of calls."""
    yield from read_bare_calls(reader, _FUNCTION_GEMMA)


def _syntax(opener: str, marks: BareWords) -> CallSyntax:
    return CallSyntax(
        mark=opener,
        head="call:{name}{",
        arguments=NamedArguments(before="{key}:", separator=",", text=(marks.quote, marks.quote)),
        end="}",
        between=f"{marks.end}{opener}",
        closing=marks.end,
    )


FORMATS = (
    ToolFormat(
        name="gemma4",
        openers=("<|tool_call>", _CODE),
        parse=parse_gemma4,
        calls=(_syntax("<|tool_call>", _GEMMA4),),
        signatures=("<|tool_call>",),
        model_types=("gemma4", "gemma4_text"),
    ),
    ToolFormat(
        name="functiongemma",
        aliases=("function_gemma",),
        openers=("<start_function_call>",),
        parse=parse_function_gemma,
        calls=(_syntax("<start_function_call>", _FUNCTION_GEMMA),),
        signatures=("<start_function_call>",),
    ),
)
