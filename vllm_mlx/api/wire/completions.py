"""Body of POST /v1/completions (https://platform.openai.com/docs/api-reference/completions/create)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from vllm_mlx.api.wire.constraints import ShapeFields
from vllm_mlx.api.wire.sampling import GenerationBody
from vllm_mlx.core.chat import CompletionRequest
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import MAX_TOP_LOGPROBS

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default on this endpoint."""

TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]


class CompletionBody(ShapeFields, GenerationBody):
    """Text or tokens to continue."""

    prompt: str | Texts | TokenIds | TokenLists
    """A text, a list of texts, a list of token ids, or a list of lists of token ids."""
    echo: bool | None = None
    """Begin each choice with its prompt; not together with `logprobs`."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Return log-probabilities of the generated tokens and of this many most likely ones, 0 to 20."""
    best_of: int | None = None
    """Only equal to `n`."""
    suffix: None = None
    """Text after the completion cannot be taken into account by this model."""


def completion_request(
    body: CompletionBody, *, request_id: str, defaults: Mapping[str, Any], tenant: bytes = b""
) -> CompletionRequest:
    """The same request in no dialect. Raises InvalidRequest for fields that contradict each other."""
    body.check_stream_options()
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of is not supported, except equal to n.", param="best_of")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo together with logprobs is not supported; send one of them.", param="echo")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return CompletionRequest(
        request_id=request_id,
        prompts=prompts(body.prompt),
        sampling=body.sampling(defaults, max_tokens=max_tokens, logprobs=body.logprobs),
        echo=bool(body.echo),
        output=body.shape(),
        timeout_s=body.timeout,
        tenant=tenant,
        wants_cache_report=bool(body.cache_report),
        priority=-(body.priority or 0),
    )


def prompts(given: str | list[str] | list[int] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """One entry a prompt, whichever of the four shapes was sent."""
    if isinstance(given, str):
        return (given,)
    token_ids = tuple(entry for entry in given if isinstance(entry, int))
    if token_ids:
        return (token_ids,)
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in given if not isinstance(entry, int))
