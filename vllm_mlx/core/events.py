"""What an endpoint receives while a request runs. The non-streaming answer is a fold of the same events."""

from __future__ import annotations

import msgspec

from vllm_mlx.core.messages import FinishReason


class TopLogprob(msgspec.Struct, frozen=True):
    """A likely token; `token` is its text (U+FFFD where its bytes are no whole character), `bytes` its UTF-8."""

    token: str
    bytes: bytes
    logprob: float


class TokenInfo(msgspec.Struct, frozen=True):
    """A generated token with its log-probability (natural log)."""

    token: str
    bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()
    """Most likely first; empty unless top_logprobs was asked for."""


class PromptToken(msgspec.Struct, frozen=True):
    """A token of the prompt with its log-probability given those before it."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float | None = None
    """None for the first token; so is `rank`."""
    rank: int | None = None
    """1 if no other was more likely."""
    top_ids: tuple[int, ...] = ()
    top: tuple[TopLogprob, ...] = ()
    """Of `top_ids`, most likely first."""
    is_text: bool = True
    """False for special tokens, which no text shows."""


class PromptScored(msgspec.Struct, frozen=True):
    """All tokens of a choice's prompt. Comes first, if it was asked for."""

    choice: int
    tokens: tuple[PromptToken, ...]


class TextDelta(msgspec.Struct, frozen=True):
    """More text of a choice. `text` may be empty when only `tokens` moved (a held-back or partial character)."""

    choice: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    """Filled only if log-probabilities were asked for."""


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of what a choice's model thinks before it answers; never part of the answer."""

    choice: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    """Filled only if log-probabilities were asked for."""


class ToolCallDelta(msgspec.Struct, frozen=True):
    """More of one tool call. The first of a call carries `id` and `name`; the others have None there."""

    choice: int
    index: int
    """Which call of the choice, from 0."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """More of the JSON text of the arguments; all of a call's pieces in order are the whole."""


class Usage(msgspec.Struct, frozen=True):
    """Token counts; over all choices when it is the request's."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Finish(msgspec.Struct, frozen=True):
    """A choice ended; the last event of that choice. `stop_string` is the one that was matched, if any."""

    choice: int
    reason: FinishReason
    usage: Usage
    """Of this choice alone; its prompt tokens are counted once per prompt, in choice 0 of that prompt."""
    stop_string: str | None = None
    queued_s: float | None = None
    """How long it waited before its prompt was begun, if the engine said."""
    prompt_token_ids: tuple[int, ...] = ()
    """Filled only if the request wants token ids; so is the next."""
    token_ids: tuple[int, ...] = ()
    """All that were generated, a stop token included."""


Event = PromptScored | TextDelta | ReasoningDelta | ToolCallDelta | Finish
