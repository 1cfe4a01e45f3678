"""What the OpenAI dialect answers. Encoded by msgspec: these records are built for every streamed piece."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from vllm_mlx.api.wire.prompt_logprobs import PromptLogprobs


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What the generated tokens were."""

    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageAnswer(msgspec.Struct, frozen=True):
    """Token counts of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class DifferenceAnswer(msgspec.Struct, frozen=True):
    """Where a prompt parts from the most similar earlier one: the texts from the first character that differs."""

    before: str
    """What both have just before it."""
    given: str
    earlier: str
    field: str | None
    """The kind of field, if it is one that changes by itself, such as 'date'."""


class CacheAnswer(msgspec.Struct, frozen=True):
    """How much of a prompt did not have to be computed, and why no more. Of several prompts, the first that missed."""

    hit_tokens: int
    """Over all prompts, like `x-cache-hit-tokens`."""
    prompt_tokens: int
    reason: str
    """'hit', 'evicted', 'no_checkpoint', 'too_short', 'never_seen', 'different_tools', 'different_system',
    'different_messages', 'volatile_field' or 'disabled'."""
    message: str
    """The same for a person."""
    seen_tokens: int
    """With how many of its tokens an earlier prompt began too, if any is still known."""
    difference: DifferenceAnswer | None


class TopLogprobAnswer(msgspec.Struct, frozen=True):
    """A likely token. `bytes` are its UTF-8 bytes as numbers."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobAnswer(msgspec.Struct, frozen=True):
    """A generated token and the likely ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprobAnswer]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry for each generated token, those of reasoning and tool calls too."""

    content: list[TokenLogprobAnswer]
    refusal: None = None


class FunctionAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which function is called, and its arguments as JSON text. A streamed piece has the name only once."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class CustomAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which custom tool is called, and its text. A streamed piece has the name only once."""

    name: str | UnsetType = UNSET
    input: str | UnsetType = UNSET


class ToolCallAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that the model makes; a streamed piece has `index`, and `id`, `type` and name only once."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionAnswer | UnsetType = UNSET
    custom: CustomAnswer | UnsetType = UNSET


class ChatMessageAnswer(msgspec.Struct, frozen=True, tag_field="role", tag="assistant"):
    """What the model said. `reasoning_content` and `reasoning` are the same text, absent without any."""

    content: str | None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET
    refusal: None = None
    annotations: list[Any] = []


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer. `finish_reason` is 'stop', 'length' or 'tool_calls'."""

    index: int
    message: ChatMessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: str
    token_ids: list[int] | UnsetType = UNSET
    """All that were generated; only with `return_token_ids`."""


class ChatCompletionAnswer(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion"):
    """Answer of POST /v1/chat/completions without a stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    system_fingerprint: str
    service_tier: str = "default"
    """The one that the request was served in."""
    prompt_token_ids: list[int] | UnsetType = UNSET
    """Only with `return_token_ids`."""
    cache: CacheAnswer | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a streamed piece adds to its choice's message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    """All of the choice, in its last piece; only with `return_token_ids`."""


class ChatChunk(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """One event of a streamed chat answer; `usage` is absent unless the stream includes it, `cache` is in the last."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageAnswer | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    """In the last piece of each choice; only with `return_token_ids`."""
    cache: CacheAnswer | UnsetType = UNSET


class TextLogprobs(msgspec.Struct, frozen=True):
    """One entry for each token; `text_offset` counts characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt, before which there is nothing."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True):
    """One continuation, or a piece of one."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionAnswer(msgspec.Struct, frozen=True, tag_field="object", tag="text_completion"):
    """Answer of POST /v1/completions, and each event of its stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageAnswer | UnsetType | None = UNSET
    cache: CacheAnswer | UnsetType = UNSET


class Capabilities(msgspec.Struct, frozen=True):
    """What requests may ask of a model."""

    completions: bool
    chat: bool
    """Whether it has a chat template."""
    tools: bool
    """Whether its tool calls are read."""
    reasoning: bool
    """Whether it marks what it thinks before it answers."""
    vision: bool = False
    audio: bool = False


class ModelCard(msgspec.Struct, frozen=True, tag_field="object", tag="model"):
    """A model that this server serves."""

    id: str
    created: int
    max_model_len: int | None
    """Most tokens, prompt and output together; null while it loads."""
    context_length: int | None
    """The same, as other servers call it."""
    context_window: int | None
    """The same."""
    max_output_tokens: int | None
    """Most tokens of an answer that a request may ask for; null while it loads."""
    root: str
    capabilities: Capabilities
    tool_call_parser: str | None
    """Name of the format of its tool calls; null if none are read."""
    reasoning_parser: str | None
    """Name of the format of its reasoning; null if none is read."""
    defaults: dict[str, Any]
    """Sampling parameters of requests that give none, where they differ from OpenAI's."""
    owned_by: str = "vllm-mlx"


class ModelList(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """Answer of GET /v1/models."""

    data: list[ModelCard]


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong. `param` is the dotted path of the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Body of every error; `detail` repeats the message for clients that expect it there."""

    error: ErrorDetail
    detail: str
