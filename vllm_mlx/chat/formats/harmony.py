"""Harmony (gpt-oss): calls are messages to a recipient; see `chat/payloads/channels.py`."""

from __future__ import annotations

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.channels import ENDS, OPENERS, RECIPIENT_FIRST, read_message
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet


def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """One message, whatever it is."""
    yield from read_message(reader, opener, tools=tools)


_SYNTAX = CallSyntax(
    head="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
    other_head=" to=functions.{name}<|channel|>commentary <|constrain|>json<|message|>",
    end="",
    is_message=True,
    raw=("<|channel|>commentary to=functions.{name}<|message|>", ""),
)

FORMATS = (
    ToolFormat(
        name="harmony",
        aliases=("gpt-oss", "gpt_oss", "openai"),
        openers=(*OPENERS, RECIPIENT_FIRST),
        parse=parse,
        calls=(_SYNTAX,),
        dropped=ENDS,
        signatures=("<|channel|>",),
        model_types=("gpt_oss",),
    ),
)
