"""Why a prompt was, or was not, found among the remembered prefixes."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from vllm_mlx.chat.seen import Nearest, Outline
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.chat.volatile import num_common, volatile_field
from vllm_mlx.core.cachespec import CacheSpec, Layout

_SHOWN = 160
"""Characters of a text that an explanation shows."""


class CacheReason(StrEnum):
    """What ended the part of a prompt that did not have to be computed."""

    HIT = "hit"
    """Nothing: all that earlier prompts had in common with it was found."""
    EVICTED = "evicted"
    """It was computed before, and its memory was needed for others, or the cache was cleared."""
    NO_CHECKPOINT = "no_checkpoint"
    """It was computed before, but this model cannot go on at any token, only where a state was kept."""
    TOO_SHORT = "too_short"
    """What it has in common with earlier prompts is less than one page."""
    NEVER_SEEN = "never_seen"
    """No prompt lately began like this one."""
    DIFFERENT_TOOLS = "different_tools"
    DIFFERENT_SYSTEM = "different_system"
    """The system text, or what the template writes before it."""
    DIFFERENT_MESSAGES = "different_messages"
    """Something else in the conversation."""
    VOLATILE_FIELD = "volatile_field"
    """A date, a time, an id: something that changes by itself."""
    DISABLED = "disabled"
    """The server runs with --no-prefix-cache."""


_SENTENCES = {
    CacheReason.HIT: "All that earlier prompts have in common with this one was found.",
    CacheReason.EVICTED: "An earlier prompt began with the same {seen} tokens, but {found} of them are remembered: the "
    "memory was needed for others, or the cache was cleared. More --cache-memory-mb, --ssd-cache-dir or warm prompts "
    "keep more.",
    CacheReason.NO_CHECKPOINT: "An earlier prompt began with the same {seen} tokens, but this model can only go on "
    "where a state was kept, which is after {found}.",
    CacheReason.TOO_SHORT: "Prefixes are remembered in pages of {page} tokens; less than one is in common.",
    CacheReason.NEVER_SEEN: "No prompt lately began like this one.",
    CacheReason.DIFFERENT_TOOLS: "The tools differ from those of the most similar earlier prompt, at token {seen}.",
    CacheReason.DIFFERENT_SYSTEM: "The system text differs from that of the most similar earlier prompt, at token "
    "{seen}.",
    CacheReason.DIFFERENT_MESSAGES: "The messages differ from those of the most similar earlier prompt, at token "
    "{seen}.",
    CacheReason.VOLATILE_FIELD: "A {field} changed, at token {seen}. Put what changes at the end of the prompt, or "
    "leave it out.",
    CacheReason.DISABLED: "The server runs with --no-prefix-cache.",
}

_DIFFERENCES = (
    CacheReason.DIFFERENT_TOOLS,
    CacheReason.DIFFERENT_SYSTEM,
    CacheReason.DIFFERENT_MESSAGES,
    CacheReason.VOLATILE_FIELD,
)


class Difference(msgspec.Struct, frozen=True):
    """Where two prompts part: the texts from the first character on that differs."""

    before: str
    """What both have just before it."""
    given: str
    earlier: str
    field: str | None = None
    """The kind of volatile field that it lies in."""


class Explanation(msgspec.Struct, frozen=True):
    """What became of one prompt."""

    reason: CacheReason
    message: str
    """The same for a person."""
    num_tokens: int
    num_found: int
    """Tokens that did not have to be computed."""
    num_seen: int
    """Tokens that an earlier prompt begins with too, if any is still known."""
    difference: Difference | None = None


class Explainer:
    """Explains with the words of one model: its tokenizer, and what its layers remember."""

    def __init__(self, tokenizer: Tokenizer, *, is_enabled: bool) -> None:
        self._tokenizer = tokenizer
        self._is_enabled = is_enabled

    def explain(
        self, num_tokens: int, num_found: int, *, outline: Outline, nearest: Nearest | None, cache: CacheSpec
    ) -> Explanation:
        """Why a prompt of `num_tokens` found `num_found` of them. `nearest` is of the time before it was computed."""
        num_seen = nearest.num_common if nearest else 0
        difference = self._difference(nearest) if nearest else None
        reachable = min(num_seen, num_tokens - 1) // cache.page_size * cache.page_size
        if not self._is_enabled:
            reason = CacheReason.DISABLED
        elif num_found < reachable:
            can_cut = all(layer.layout is Layout.PAGES for layer in cache.layers)
            reason = CacheReason.EVICTED if can_cut else CacheReason.NO_CHECKPOINT
        elif nearest is None or num_found > num_seen:
            reason = CacheReason.HIT if num_found else CacheReason.NEVER_SEEN
        elif difference is None:
            reason = CacheReason.HIT if num_found else CacheReason.TOO_SHORT
        else:
            reason = _kind(difference, outline, nearest.outline, is_found=num_found > 0)
        shown = difference if reason in _DIFFERENCES else None
        field = shown.field if shown else None
        message = _SENTENCES[reason].format(seen=num_seen, found=num_found, page=cache.page_size, field=field)
        return Explanation(reason, message, num_tokens, num_found, num_seen, shown)

    def _difference(self, nearest: Nearest) -> Difference | None:
        """None if one of the two is the beginning of the other."""
        if not nearest.given_ids or not nearest.earlier_ids:
            return None
        before = self._text(nearest.before_ids)
        given = self._text(nearest.before_ids + nearest.given_ids)
        earlier = self._text(nearest.before_ids + nearest.earlier_ids)
        field = volatile_field(before, given[len(before) :], earlier[len(before) :])
        start = num_common(given, earlier)
        return Difference(
            before=given[max(0, start - _SHOWN) : start],
            given=given[start : start + _SHOWN],
            earlier=earlier[start : start + _SHOWN],
            field=field,
        )

    def _text(self, token_ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _kind(difference: Difference, given: Outline, earlier: Outline, *, is_found: bool) -> CacheReason:
    """Which part of the prompt differs."""
    if difference.field is not None:
        return CacheReason.VOLATILE_FIELD
    if not is_found and not given.num_shared(earlier):
        return CacheReason.NEVER_SEEN
    if given.tools != earlier.tools:
        return CacheReason.DIFFERENT_TOOLS
    return CacheReason.DIFFERENT_SYSTEM if given.system != earlier.system else CacheReason.DIFFERENT_MESSAGES
