"""Bodies and answers of /tokenize, /detokenize and /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import Field

from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.api.wire.chat_completions import ChatCompletionBody
from vllm_mlx.api.wire.messages import WireMessage
from vllm_mlx.api.wire.tools import WireTools


class TokenizeTextBody(WireModel):
    """Raw text."""

    model: str | None = None
    """Served name, model argument, or `default`; the served model if absent."""
    prompt: str
    """The text."""
    add_special_tokens: bool = True
    """Add what the model wants around raw text, often a first BOS."""
    return_token_strs: bool | None = None
    """Return the text of each token too."""


class TokenizeChatBody(WireModel):
    """A conversation."""

    model: str | None = None
    """Served name, model argument, or `default`; the served model if absent."""
    messages: Annotated[list[WireMessage], Field(min_length=1, fail_fast=True)]
    """The conversation, oldest first."""
    tools: WireTools | None = None
    """Functions that the model is told of."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template."""
    add_generation_prompt: bool | None = None
    """False: end with the last message, without the beginning of an answer."""
    continue_final_message: bool | None = None
    """End inside the last message, which must be the assistant's."""
    add_special_tokens: bool = False
    """Add what the model wants around raw text; the chat template has mostly written it already."""
    return_token_strs: bool | None = None
    """Return the text of each token too."""

    def as_chat(self) -> ChatCompletionBody:
        """The chat request that has this prompt."""
        given = self.model_dump(
            include={"tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
        )
        return ChatCompletionBody.model_validate({"messages": [m.model_dump() for m in self.messages], **given})


class TokenizeAnswer(msgspec.Struct, frozen=True):
    """Token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(WireModel):
    """Token ids."""

    model: str | None = None
    """Served name, model argument, or `default`; the served model if absent."""
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
    """Ids of the model's vocabulary."""


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """The text of tokens, special ones included."""

    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True):
    """What a client needs to count and cut tokens with this server alone, without the model's files."""

    bos_token: str | None
    """Text of the token that begins a sequence, if there is one."""
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    """Source of the Jinja template."""
    model_max_length: int
    """Most tokens of prompt and output together."""
