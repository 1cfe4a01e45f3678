"""Texts that clients change with every request, so that no prefix is ever the same again.

`RULES` are taken out of prompts (`--stable-prompts`): fields that mean nothing to the model. `FIELDS` are only
recognised, to explain a miss: dates, times, ids. They may matter to the model, so they stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from vllm_mlx.core.chat import Message, TextPart


class Rule(msgspec.Struct, frozen=True):
    """A field that may be replaced."""

    name: str
    client: str
    """Who writes it."""
    role: str
    """Role of the messages in which it is looked for; nowhere else."""
    pattern: re.Pattern[str]
    """Matched in each text part on its own."""
    replacement: str
    reason: str
    """Why the model does not miss it."""


class Field(msgspec.Struct, frozen=True):
    """A kind of text that changes by itself."""

    name: str
    pattern: re.Pattern[str]


RULES = (
    Rule(
        name="billing line",
        client="Claude Code",
        role="system",
        pattern=re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n*"),
        replacement="",
        reason="Accounting data for the vendor's own servers: version, entry point and a checksum of the request. It "
        "is the whole first block of the system text, and the vendor takes it off before the model.",
    ),
)

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
FIELDS = (
    Field("billing line", re.compile(r"x-anthropic-billing-header:[^\n]*")),
    Field("date and time", re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?")),
    Field("date", re.compile(rf"\d{{4}}-\d\d-\d\d|\d{{1,2}}/\d{{1,2}}/\d{{2,4}}|{_MONTH} \d{{1,2}},? \d{{4}}")),
    Field(
        "date", re.compile(rf"\d{{1,2}}\.? {_MONTH} \d{{4}}|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*,? {_MONTH} \d{{1,2}}")
    ),
    Field("time", re.compile(r"\d{1,2}:\d\d(?::\d\d(?:\.\d+)?)?")),
    Field("identifier", re.compile(_UUID, re.IGNORECASE)),
    Field(
        "token count",
        re.compile(r"[Tt]okens?[^\n\d]{0,20}\d[\d,]*(?:/\d[\d,]*)?|\d[\d,]* (?:tokens )?(?:left|remaining)"),
    ),
    Field("checksum", re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,}\b", re.IGNORECASE)),
    Field("Unix time", re.compile(r"\b1[5-9]\d{8}(?:\d{3})?\b")),
)


def stable_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages without what `RULES` takes out; those without any such field are the same objects."""
    return tuple(_stable(message) for message in messages)


def volatile_field(before: str, given: str, earlier: str) -> str | None:
    """Name of the field in which two texts differ, if it is one that changes by itself.

    Both texts go on after `before`; the field must be in both and reach over the first difference.
    """
    one, other = before + given, before + earlier
    position = num_common(one, other)
    for field in FIELDS:
        if _covers(field.pattern, one, position) and _covers(field.pattern, other, position):
            return field.name
    return None


def num_common(one: Sequence[object], other: Sequence[object]) -> int:
    """With how many characters both texts begin, or pieces of text both sequences."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _covers(pattern: re.Pattern[str], text: str, position: int) -> bool:
    return any(match.start() <= position < match.end() for match in pattern.finditer(text))


def _stable(message: Message) -> Message:
    rules = [rule for rule in RULES if rule.role == message.role]
    if not rules or message.content is None:
        return message
    if isinstance(message.content, str):
        text = _apply(rules, message.content)
        return message if text == message.content else msgspec.structs.replace(message, content=text)
    texts = [_apply(rules, part.text) for part in message.content]
    if texts == [part.text for part in message.content]:
        return message
    # A part that was nothing else goes altogether, or its separator would stay.
    return msgspec.structs.replace(message, content=tuple(TextPart(text) for text in texts if text))


def _apply(rules: Sequence[Rule], text: str) -> str:
    for rule in rules:
        text = rule.pattern.sub(rule.replacement, text)
    return text
