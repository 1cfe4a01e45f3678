"""DSML: DeepSeek V3.2 and V4. Elements whose parameters say whether they are text or JSON."""

from __future__ import annotations

from vllm_mlx.chat.call_syntax import CallSyntax, NamedArguments
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.invokes import Invokes, invokes_parser

_MARK = "｜DSML｜"
_RULES = Invokes(
    wrappers=(f"<{_MARK}tool_calls>", f"<{_MARK}function_calls>"),
    wrapper_ends=(f"</{_MARK}tool_calls>", f"</{_MARK}function_calls>"),
    call=f"<{_MARK}invoke",
    call_end=f"</{_MARK}invoke>",
    parameter=f"<{_MARK}parameter",
    parameter_end=f"</{_MARK}parameter>",
)


def _syntax(section: str, template: str = "") -> CallSyntax:
    return CallSyntax(
        mark=f"<{_MARK}{section}>",
        opening="\n",
        head=f'<{_MARK}invoke name="{{name}}">\n',
        arguments=NamedArguments(
            before=f'<{_MARK}parameter name="{{key}}" string="{{is_text}}">',
            behind=f"</{_MARK}parameter>\n",
            frame="\n",
        ),
        end=f"</{_MARK}invoke>\n",
        between="",
        closing=f"</{_MARK}{section}>",
        template=template,
    )


FORMATS = (
    ToolFormat(
        name="deepseek_v4",
        aliases=("dsml", "deepseek_v32", "deepseek_v3.2", "deepseek_v41"),
        openers=(*_RULES.wrappers, _RULES.call),
        parse=invokes_parser(_RULES),
        calls=(_syntax("function_calls", "function_calls"), _syntax("tool_calls")),
        dropped=("<｜end▁of▁sentence｜>",),
        signatures=(_MARK,),
        model_types=("deepseek_v32", "deepseek_v4"),
    ),
)
