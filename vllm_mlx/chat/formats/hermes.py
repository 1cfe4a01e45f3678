"""`<tool_call>` with JSON, elements or keys and values inside: Hermes, Qwen, Nemotron, GLM and many others."""

from __future__ import annotations

from vllm_mlx.chat.call_syntax import ELEMENT, CallSyntax, NamedArguments
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.elements import Pairs
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tagged import (
    BRACKET,
    BRACKET_END,
    FUNCTION,
    TAGGED,
    TAGGED_END,
    TYPED_BY_SCHEMA,
    read_bracket,
    read_tagged,
)
from vllm_mlx.chat.payloads.tools import ToolSet


def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """Whichever of the three stands behind the tag."""
    if opener == BRACKET:
        yield from read_bracket(reader, end=BRACKET_END)
    else:
        yield from read_tagged(reader, opener, tools)


def parse_qwen3_xml(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """As `parse`, but values without a schema are text."""
    yield from read_tagged(reader, opener, tools, elements=TYPED_BY_SCHEMA)


def parse_glm(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """As `parse`, but a name alone is a call."""
    yield from read_tagged(reader, opener, tools, pairs=Pairs())


_JSON = CallSyntax(
    mark=TAGGED,
    opening="\n",
    between=f"\n{TAGGED_END}\n{TAGGED}\n",
    closing=f"\n{TAGGED_END}",
    raw=ELEMENT,
)
_ELEMENTS = CallSyntax(
    mark=TAGGED,
    opening="\n",
    head="<function={name}>\n",
    arguments=NamedArguments(before="<parameter={key}>\n", behind="\n</parameter>\n"),
    end="</function>",
    between=_JSON.between,
    closing=_JSON.closing,
)
_GLM = CallSyntax(
    mark=TAGGED,
    head="{name}\n",
    arguments=NamedArguments(before="<arg_key>{key}</arg_key>\n<arg_value>", behind="</arg_value>\n", frame="\n"),
    end="",
    between=f"{TAGGED_END}\n{TAGGED}",
    closing=TAGGED_END,
)

FORMATS = (
    ToolFormat(
        name="hermes",
        aliases=(
            *("nous", "qwen", "qwen3", "qwen2.5", "qwen3_json", "qwen3_vl", "smollm3", "ernie45", "granite4", "ring"),
            *("step", "step3p5", "nemotron", "nemotron3", "nemotron_v3", "holo2", "mimo"),
        ),
        openers=(TAGGED, FUNCTION, BRACKET),
        parse=parse,
        calls=(_JSON,),
        signatures=("<tool_call>",),
        model_types=("qwen2", "qwen3", "qwen3_moe", "smollm3", "ernie4_5", "ernie4_5_moe"),
    ),
    ToolFormat(
        name="qwen3_xml",
        aliases=("qwen3_coder", "qwenxml", "qwen3.5", "qwen3.6", "qwen3_next"),
        openers=(TAGGED, FUNCTION),
        parse=parse_qwen3_xml,
        calls=(_ELEMENTS,),
        signatures=("<tool_call>", "<function="),
    ),
    ToolFormat(
        name="glm47",
        aliases=("glm4", "glm45", "glm5", "ling3"),
        openers=(TAGGED,),
        parse=parse_glm,
        calls=(_GLM,),
        dropped=("<|begin_of_box|>", "<|end_of_box|>"),
        signatures=("<tool_call>", "<arg_key>"),
    ),
)
