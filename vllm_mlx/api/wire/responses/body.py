"""Bodies of the Responses API (https://platform.openai.com/docs/api-reference/responses/create)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.base import WireModel, unsupported
from vllm_mlx.api.wire.chat_completions import Effort, ServiceTier
from vllm_mlx.api.wire.responses.items import InputItem
from vllm_mlx.api.wire.responses.tools import WireTool, WireToolChoice
from vllm_mlx.api.wire.sampling import GenerationBody
from vllm_mlx.core.sampling import MAX_TOP_LOGPROBS

Summary = Literal["auto", "concise", "detailed"]
Metadata = Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)]

ENCRYPTED = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (ENCRYPTED, LOGPROBS)


def _includable(value: Any) -> Any:
    if isinstance(value, str) and value not in INCLUDABLE:
        raise unsupported(f"must be one of {', '.join(INCLUDABLE)}: the server has nothing else to include")
    return value


Includable = Annotated[
    Literal["reasoning.encrypted_content", "message.output_text.logprobs"], BeforeValidator(_includable)
]


class Reasoning(WireModel):
    """How the model thinks."""

    effort: Effort | None = None
    """Given to the chat template as `reasoning_effort`; `none` also as `enable_thinking: false`."""
    summary: Summary | None = None
    """Send the reasoning as summary instead of content. It is not shortened, whichever is asked for."""
    generate_summary: Summary | None = None
    """Older name of `summary`."""
    context: Literal["auto"] | None = None
    """Only `auto`: the chat template decides which earlier reasoning the model sees."""
    mode: Literal["standard"] | None = None
    """Only `standard`."""


class TextFormat(WireModel):
    """Any text."""

    type: Literal["text"]
    """`text`."""


class JsonObjectFormat(WireModel):
    """A JSON object."""

    type: Literal["json_object"]
    """`json_object`."""


class JsonSchemaFormat(WireModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    """`json_schema`."""
    name: str
    """Name of the schema."""
    schema_: dict[str, Any] = Field(alias="schema")
    """The schema."""
    description: str | None = None
    """Accepted; not shown to the model."""
    strict: bool | None = None
    """False: a keyword that cannot be enforced is left to the model instead of being refused."""


class TextConfig(WireModel):
    """What the answer looks like."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    """`text`, `json_object` or `json_schema`."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Given to the chat template as `verbosity`; templates that do not know it ignore it."""


class ConversationName(WireModel):
    """Which conversation."""

    id: str
    """Its id."""


class ResponseStreamOptions(WireModel):
    """How a stream is sent."""

    include_obfuscation: bool | None = None
    """Accepted; this server never pads its events."""


class PromptFields(WireModel):
    """What a prompt is made of."""

    input: str | Annotated[list[InputItem], Field(fail_fast=True)] | None = None
    """Text of the user, or items; they follow what `previous_response_id` or `conversation` names."""
    instructions: str | None = None
    """A system message for this response alone."""
    previous_response_id: str | None = None
    """Go on from this stored response."""
    conversation: str | ConversationName | None = None
    """Go on from this stored conversation, and add what is new to it."""
    tools: list[WireTool] | None = None
    """Functions, namespaces of them and custom tools. `web_search` is accepted and never called."""
    tool_choice: WireToolChoice | None = None
    """`auto`, `none`, `required`, a named tool or `allowed_tools`."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may have several calls; true if absent."""
    reasoning: Reasoning | None = None
    """How the model thinks."""
    text: TextConfig | None = None
    """What the answer looks like."""
    truncation: Literal["auto", "disabled"] | None = None
    """`auto` drops the oldest turns of a conversation that is too long; `disabled` refuses it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template; they win over the server's own."""

    @property
    def conversation_id(self) -> str | None:
        """Id of the conversation, if there is one."""
        given = self.conversation
        return given.id if isinstance(given, ConversationName) else given

    @property
    def wants_summary(self) -> bool:
        """Whether reasoning is sent as summary."""
        given = self.reasoning
        return given is not None and (given.summary or given.generate_summary) is not None


class InputTokensBody(PromptFields):
    """A prompt to be counted."""

    model: str | None = None
    """Served name, model argument, or `default`; the served model if absent."""
    personality: None = None
    """The server has none."""


class ResponsesBody(GenerationBody, PromptFields):
    """A response to be made."""

    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate, reasoning and calls included."""
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None
    """Most tokens of reasoning; then the answer is made to begin."""
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Accepted: it limits built-in tools, and the server has none."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Return log-probabilities of this many most likely tokens at each position, 0 to 20."""
    include: list[Includable] | None = None
    """`reasoning.encrypted_content` and `message.output_text.logprobs`."""
    store: bool | None = None
    """Keep the response, so that others can go on from it; true if absent."""
    background: bool | None = None
    """Answer at once, and go on without the client; needs `store`."""
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]
    """Needs `stream: true`."""
    metadata: Metadata | None = None
    """Up to 16 texts that come back with the response."""
    service_tier: ServiceTier | None = None
    """`priority` goes before `default`, `flex` after it; `priority`, the number, decides among equals of a tier."""
    prompt_cache_key: str | None = None
    """Accepted; equal prefixes are shared without it."""
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """Accepted; the server decides how long prefixes are kept."""
    prompt_cache_options: Any = None
    """Accepted; the server decides how long prefixes are kept."""
    safety_identifier: str | None = None
    """Comes back with the response."""
    client_metadata: dict[str, Any] | None = None
    """Accepted; Codex sends it."""
    n: None = None
    """A response has one answer."""
    max_tokens: None = None
    """Send max_output_tokens."""
    prompt: None = None
    """Stored prompt templates are not offered."""
    context_management: Annotated[list[Any], Field(max_length=0)] | None = None
    """Only an empty list: conversations are not compacted."""
    moderation: None = None
    """The server does not moderate."""
    access_programs: None = None
    """Not offered."""
    background_options: None = None
    """Not offered."""
    image: None = None
    """The server makes no images."""
