"""Body of POST /v1/completions (https://platform.openai.com/docs/api-reference/completions/create)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from vllm_mlx.api.wire.best_of import Best
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
    """Begin each choice with its prompt; with `logprobs`, its tokens' log-probabilities are returned too."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Return log-probabilities of the generated tokens and of this many most likely ones, 0 to 20."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Most tokens to generate, 16 if absent; 0 with `echo` looks at the prompt only."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    """Generate so many choices for each prompt and return the `n` with the highest log-probability per token. Not in a
    stream, unless equal to `n`."""
    suffix: str | None = None
    """Text that follows what is to be written, for models that were taught to fill in; not together with `echo`."""


def completion_request(
    body: CompletionBody, *, request_id: str, defaults: Mapping[str, Any], tenant: bytes = b""
) -> CompletionRequest:
    """The same request in no dialect. Raises InvalidRequest for fields that contradict each other."""
    body.check_stream_options()
    _check(body)
    sampling = body.sampling(
        defaults,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens),
        logprobs=body.logprobs,
    )
    if (best := best_of(body)) is not None:
        sampling = sampling.replace(n=best.candidates, logprobs=body.logprobs or 0)
    echoes_logprobs = bool(body.echo) and body.logprobs is not None
    if echoes_logprobs:
        sampling = sampling.replace(prompt_logprobs=max(body.logprobs or 0, body.prompt_logprobs or 0))
    return CompletionRequest(
        request_id=request_id,
        prompts=prompts(body.prompt),
        sampling=sampling,
        suffix=body.suffix,
        echo=bool(body.echo),
        output=body.shape(),
        is_prompt_only=body.max_tokens == 0,
        reports_end=echoes_logprobs or best is not None,
        timeout_s=body.timeout,
        tenant=tenant,
        wants_cache_report=bool(body.cache_report),
        priority=-(body.priority or 0),
    )


def best_of(body: CompletionBody) -> Best | None:
    """How the choices to return are found; None if all are returned."""
    shown = body.n or 1
    return None if body.best_of in (None, shown) else Best(body.best_of or shown, shown)


def _check(body: CompletionBody) -> None:
    """Raise InvalidRequest for fields that contradict each other."""
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens: 0 needs echo: true, or there is nothing to return.", param="max_tokens")
    if body.echo and body.suffix is not None:
        raise InvalidRequest("suffix and echo exclude each other; send one of them.", param="suffix")
    if (best := best_of(body)) is None:
        return
    if best.candidates < best.shown:
        raise InvalidRequest(f"best_of must be at least n, which is {best.shown}.", param="best_of")
    if body.stream:
        raise InvalidRequest("best_of cannot be streamed, except equal to n.", param="best_of")


def prompts(given: str | list[str] | list[int] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """One entry a prompt, whichever of the four shapes was sent."""
    if isinstance(given, str):
        return (given,)
    token_ids = tuple(entry for entry in given if isinstance(entry, int))
    if token_ids:
        return (token_ids,)
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in given if not isinstance(entry, int))
