"""How model families mark what they think: records only, read by the state machine in `chat/parse.py`."""

from __future__ import annotations

import msgspec


class ReasoningFormat(msgspec.Struct, frozen=True, kw_only=True):
    """One way to mark reasoning."""

    name: str
    aliases: tuple[str, ...] = ()
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    opens_anywhere: bool = True
    """Whether the opening marks stand in no ordinary text; others count where no answer has begun."""
    may_begin_open: bool = True
    """Whether a prompt may have opened it, so that output of an unknown beginning may lie inside."""
    labels: tuple[str, ...] = ()
    """What may stand right behind an opening mark and is not part of the text."""
    ended_by: tuple[str, ...] = ()
    """Marks of what follows reasoning; they end it even where its closing mark is missing."""
    dropped: tuple[str, ...] = ()
    """Marks around the answer that are not part of it."""
    has_channels: bool = False
    """Messages in channels (Harmony) instead of marks."""
    signatures: tuple[str, ...] = ()
    """Texts that chat templates of these models contain, all of them."""
    model_types: tuple[str, ...] = ()
    """Values of `model_type` that write so whatever the template says."""

    def leaves_open(self, text: str) -> bool:
        """Whether reasoning is open at the end of `text`, the end of a prompt."""
        return _last(text, self.opens) > _last(text, self.closes)


_THINK = ("<think>",)
_THINK_END = ("</think>",)

REASONING_FORMATS = (
    ReasoningFormat(
        name="qwen3",
        aliases=(
            *("deepseek_r1", "deepseek_v3", "step3", "step5", "step3p5", "poolside_v1", "glm4", "glm45", "glm47"),
            *("olmo3", "nemotron", "nemotron_v3", "holo2", "mimo", "smollm3", "ernie45", "minimax_m2", "minimax"),
            *("granite_thinking_parser", "minicpmv", "ling3", "hy_v3", "internlm", "longcat", "think"),
        ),
        opens=_THINK,
        opens_anywhere=False,
        closes=_THINK_END,
        dropped=("<|begin_of_box|>", "<|end_of_box|>"),
        signatures=_THINK_END,
    ),
    ReasoningFormat(
        name="kimi_k2",
        aliases=("kimi", "moonshot"),
        opens=_THINK,
        opens_anywhere=False,
        closes=_THINK_END,
        ended_by=("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"),
        signatures=("</think>", "<|tool_call_argument_begin|>"),
    ),
    ReasoningFormat(
        name="deepseek_v4",
        aliases=("deepseek_v32", "deepseek_v41"),
        opens=_THINK,
        opens_anywhere=False,
        closes=_THINK_END,
        ended_by=("<｜DSML｜tool_calls>", "<｜DSML｜function_calls>"),
        signatures=("</think>", "｜DSML｜"),
    ),
    ReasoningFormat(
        name="hunyuan_a13b",
        opens=_THINK,
        opens_anywhere=False,
        closes=_THINK_END,
        dropped=("<answer>", "</answer>"),
        signatures=("</think>", "<answer>"),
    ),
    ReasoningFormat(
        name="mistral",
        aliases=("magistral",),
        opens=("[THINK]",),
        closes=("[/THINK]",),
        signatures=("[THINK]",),
    ),
    ReasoningFormat(
        name="gemma4",
        opens=("<|channel>",),
        closes=("<channel|>", "<|channel>response\n"),
        labels=("thought\n",),
        dropped=("<|channel>response\n",),
        signatures=("<|channel>",),
        model_types=("gemma4", "gemma4_text"),
    ),
    ReasoningFormat(name="seed_oss", opens=("<seed:think>",), closes=("</seed:think>",), signatures=("</seed:think>",)),
    ReasoningFormat(name="minimax_m3", opens=("<mm:think>",), closes=("</mm:think>",), signatures=("</mm:think>",)),
    ReasoningFormat(
        name="cohere",
        aliases=("command_a",),
        opens=("<|START_THINKING|>",),
        closes=("<|END_THINKING|>",),
        dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        signatures=("<|START_THINKING|>",),
    ),
    ReasoningFormat(
        name="granite",
        opens_anywhere=False,
        opens=("Here is my thought process:", "Here's my thought process:"),
        closes=("Here is my response:", "Here's my response:"),
        signatures=("Here is my thought process:",),
    ),
    ReasoningFormat(
        name="inkling",
        opens=("<|content_thinking|>",),
        may_begin_open=False,
        closes=("<|end_message|>",),
        dropped=("<|content_text|>", "<|message_model|>", "<|end_message|>"),
        signatures=("<|content_thinking|>",),
    ),
    ReasoningFormat(
        name="harmony",
        aliases=("gpt_oss", "gpt-oss", "openai_gptoss"),
        has_channels=True,
        signatures=("<|channel|>", "analysis"),
        model_types=("gpt_oss",),
    ),
)


def _last(text: str, marks: tuple[str, ...]) -> int:
    return max((text.rfind(mark) for mark in marks), default=-1)


def reasoning_format(name: str) -> ReasoningFormat:
    """The format of a name or alias. Raises KeyError."""
    for form in REASONING_FORMATS:
        if name.lower() in (form.name, *form.aliases):
            return form
    raise KeyError(name)


def reasoning_format_names() -> tuple[str, ...]:
    """All names and aliases, sorted."""
    return tuple(sorted(name for form in REASONING_FORMATS for name in (form.name, *form.aliases)))
