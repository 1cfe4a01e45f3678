"""DSML: DeepSeek V3.2 and V4. Elements whose parameters say whether they are text or JSON."""

from __future__ import annotations

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

FORMATS = (
    ToolFormat(
        name="deepseek_v4",
        aliases=("dsml", "deepseek_v32", "deepseek_v3.2", "deepseek_v41"),
        openers=(*_RULES.wrappers, _RULES.call),
        parse=invokes_parser(_RULES),
        dropped=("<｜end▁of▁sentence｜>",),
        signatures=(_MARK,),
        model_types=("deepseek_v32", "deepseek_v4"),
    ),
)
