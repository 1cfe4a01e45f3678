"""Elements in a section of their own: MiniMax M2 and M3, Step 3, Dots, Seed-OSS."""

from __future__ import annotations

import msgspec

from vllm_mlx.chat.call_syntax import CallSyntax, NamedArguments
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.invokes import Invokes, invokes_parser

_MINIMAX = Invokes(
    wrappers=("<minimax:tool_call>", "<mm:tool_call>"), wrapper_ends=("</minimax:tool_call>", "</mm:tool_call>")
)
_DOTS = Invokes(wrappers=("<dots_function_call>",), wrapper_ends=("</dots_function_call>",))
_SEED = Invokes(
    wrappers=("<seed:tool_call>",), wrapper_ends=("</seed:tool_call>",), call="<function", call_end="</function>"
)
_STEP = Invokes(
    wrappers=("<｜tool_calls_begin｜>",),
    wrapper_ends=("<｜tool_calls_end｜>",),
    call="<steptml:invoke",
    call_end="</steptml:invoke>",
    parameter="<steptml:parameter",
    parameter_end="</steptml:parameter>",
    before=("<｜tool_call_begin｜>", "function", "<｜tool_sep｜>"),
    after=("<｜tool_call_end｜>",),
    guess=True,
)

_INVOKE = CallSyntax(
    mark="<minimax:tool_call>",
    head='\n<invoke name="{name}">\n',
    arguments=NamedArguments(before='<parameter name="{key}">', behind="</parameter>\n", frame="\n"),
    end="</invoke>",
    between="",
    closing="\n</minimax:tool_call>",
)
_SEED_SYNTAX = CallSyntax(
    mark="<seed:tool_call>",
    opening="\n",
    head="<function={name}>\n",
    arguments=NamedArguments(before="<parameter={key}>", behind="</parameter>\n", frame="\n"),
    end="</function>",
    between="\n</seed:tool_call>\n<seed:tool_call>\n",
    closing="\n</seed:tool_call>",
)
_STEP_SYNTAX = CallSyntax(
    mark="<｜tool_calls_begin｜>",
    head='\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">\n',
    arguments=NamedArguments(before='<steptml:parameter name="{key}">', behind="</steptml:parameter>\n", frame="\n"),
    end="</steptml:invoke><｜tool_call_end｜>",
    between="",
    closing="\n<｜tool_calls_end｜>",
)

FORMATS = (
    ToolFormat(
        name="minimax",
        aliases=("minimax_m2", "minimaxm2", "minimax_m3"),
        openers=(*_MINIMAX.wrappers, "<invoke name="),
        parse=invokes_parser(_MINIMAX),
        calls=(_INVOKE,),
        dropped=("[e~[",),
        signatures=("minimax:tool_call",),
        model_types=("minimax", "minimax_m2"),
    ),
    ToolFormat(
        name="dots",
        openers=_DOTS.wrappers,
        parse=invokes_parser(_DOTS),
        calls=(msgspec.structs.replace(_INVOKE, mark=_DOTS.wrappers[0], closing=f"\n{_DOTS.wrapper_ends[0]}"),),
        signatures=_DOTS.wrappers,
        model_types=("dots1",),
    ),
    ToolFormat(
        name="seed_oss",
        openers=_SEED.wrappers,
        parse=invokes_parser(_SEED),
        calls=(_SEED_SYNTAX,),
        signatures=("<seed:tool_call>",),
        model_types=("seed_oss",),
    ),
    ToolFormat(
        name="step3",
        openers=_STEP.wrappers,
        parse=invokes_parser(_STEP),
        calls=(_STEP_SYNTAX,),
        signatures=("steptml:",),
    ),
)
