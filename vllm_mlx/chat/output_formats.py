"""How the served model writes reasoning and tool calls: found in its template, or set by the operator."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

from vllm_mlx.chat.detect import detect
from vllm_mlx.chat.formats import ToolFormat, tool_format, tool_format_names
from vllm_mlx.chat.reasoning import ReasoningFormat, reasoning_format, reasoning_format_names
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError

AUTO = "auto"
NONE = "none"
FALLBACK = "hermes"
"""What `chat/plain_tools.py` asks for where the template knows no tools."""
UNKNOWN = "auto"
"""The format that knows all marks: for templates that show tools in a way nobody has described."""

_Format = TypeVar("_Format")


class OutputFormats(msgspec.Struct, frozen=True):
    """What one model's output is read with; None: nothing of that kind is looked for."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    hidden_ids: frozenset[int] = frozenset()
    """Tokens that are no text even to a parser: the other special tokens may be marks."""
    special: re.Pattern[str] | None = None
    """Texts of the special tokens that a parser sees: what it leaves of them is no text."""
    template: str = ""
    """The chat template, where ways to write are told apart that are read alike."""
    knows_tools: bool = True
    """Whether the template shows tools; a model whose template does not was not taught when to stop calling."""


def output_formats(tokenizer: Tokenizer, *, config: Config, renders_tools: bool) -> OutputFormats:
    """The formats of a model.

    Raises:
        ConfigError: `--tool-call-parser` or `--reasoning-parser` names no format.
    """
    found = detect(tokenizer.chat_template or "", tokenizer.model_type)
    tools = _chosen(
        config.tool_call_parser,
        (found.tools or UNKNOWN) if renders_tools else FALLBACK,
        tool_format,
        flag="--tool-call-parser",
        names=tool_format_names(),
    )
    reasoning = _chosen(
        config.reasoning_parser,
        found.reasoning,
        reasoning_format,
        flag="--reasoning-parser",
        names=reasoning_format_names(),
    )
    hidden = _never_marks(tokenizer, tools, reasoning)
    texts = sorted((tokenizer.token_text(i) for i in tokenizer.special_ids - hidden), key=len, reverse=True)
    special = re.compile("|".join(re.escape(text) for text in texts if text)) if any(texts) else None
    return OutputFormats(tools, reasoning, hidden, special, tokenizer.chat_template or "", renders_tools)


def _chosen(
    said: str, found: str | None, by_name: Callable[[str], _Format], *, flag: str, names: tuple[str, ...]
) -> _Format | None:
    name = found if said == AUTO else said
    if name is None or said == NONE:
        return None
    try:
        return by_name(name)
    except KeyError:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else f": {AUTO}, {NONE}, {', '.join(names)}"
        raise ConfigError(f"{flag}: {name!r} is no known format{hint}") from None


def _never_marks(tokenizer: Tokenizer, tools: ToolFormat | None, reasoning: ReasoningFormat | None) -> frozenset[int]:
    """Special tokens that end or pad sequences, unless a format names them as a mark."""
    roles = [tokenizer.token_id(text) for text in tokenizer.special_tokens.values()]
    ids = tokenizer.eos_token_ids.union(i for i in roles if i is not None)
    marks: set[str] = set()
    if tools:
        marks.update((*tools.openers, *tools.dropped, *tools.signatures))
    if reasoning:
        marks.update((*reasoning.opens, *reasoning.closes, *reasoning.ended_by, *reasoning.dropped))
    return frozenset(i for i in ids & tokenizer.special_ids if tokenizer.token_text(i) not in marks)
