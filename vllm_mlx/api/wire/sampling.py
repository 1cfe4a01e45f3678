"""Fields that every generating endpoint of the OpenAI dialect shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import MAX_TOP_LOGPROBS, SamplingParams, merge

MAX_STOP_STRINGS = 16
MAX_PRIORITY = 1_000_000
MAX_BAD_WORDS = 1000
_MAX_ID_DIGITS = 18

BadWord = Annotated[str, Field(max_length=500)]

_OWN_NAMES = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)


class StreamOptions(WireModel):
    """How a stream is sent."""

    include_usage: bool | None = None
    """Send one more chunk before `[DONE]`, with token counts and no choices."""
    continuous_usage_stats: bool | None = None
    """Send the token counts so far with every chunk, too; needs `include_usage`. Of vLLM."""
    include_obfuscation: bool | None = None
    """Accepted; this server never pads its chunks."""


class GenerationBody(WireModel):
    """Sampling, streaming and bookkeeping fields."""

    model: str | None = None
    """Served name, model argument, or `default`; the served model if absent."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """Needs `stream: true`."""
    n: int | None = None
    """Number of choices for each prompt, 1 to 128."""
    temperature: float | None = None
    """0 to 2; 0 takes the most likely token. Applied before the filters top_k, top_p and min_p."""
    top_p: float | None = None
    """Keep the most likely tokens whose probabilities add up to this; above 0, at most 1."""
    top_k: int | None = None
    """Keep this many of the most likely tokens; 0 or -1 keeps all."""
    min_p: float | None = None
    """Drop tokens less likely than this fraction of the most likely one; 0 to 1."""
    repetition_penalty: float | None = None
    """Divide (positive) or multiply (negative) logits of tokens seen in prompt or output; 1 is off."""
    frequency_penalty: float | None = None
    """Subtracted from a token's logit for each time it was generated; -2 to 2."""
    presence_penalty: float | None = None
    """Subtracted from the logit of each token that was generated; -2 to 2."""
    logit_bias: dict[str, float] | None = None
    """Token id (as text) to a value added to its logit, -100 to 100."""
    allowed_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    """Only these tokens are generated; without one that ends the text it goes on to max_tokens."""
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    """Texts that are not generated, at the beginning of a word or within one, as the model's tokens spell
    them; at most 1000 of 500 characters."""
    seed: int | None = None
    """The same seed and request give the same tokens."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate."""
    min_tokens: int | None = None
    """No end of sequence before this many tokens."""
    ignore_eos: bool | None = None
    """Go on to max_tokens whatever the model says."""
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    """Text, or up to 16 texts, at which generation ends; the text itself is not returned. Looked for in the answer and
    in reasoning, not in tool calls."""
    include_stop_str_in_output: bool | None = None
    """Return the stop string that was found, or the text of the stop token, too."""
    skip_special_tokens: bool | None = None
    """False shows tokens that only structure the conversation; they are left out otherwise."""
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    """Tokens at which generation ends."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Return log-probabilities of the prompt's tokens and of this many most likely ones, 0 to 20; not in a stream."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which the request is given up; the server's --timeout if absent."""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """Requests with a lower number go first and are interrupted last; 0 if absent, at most a million either way."""
    cache_report: bool | None = None
    """Say in the answer, as `cache`, how much of the prompt was found and why no more; a stream ends with it."""
    user: str | None = None
    """Accepted; not used."""

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_on(self) -> bool:
        """Whether every chunk of a stream has token counts."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def check_stream_options(self) -> None:
        """Raise InvalidRequest for stream options without a stream, and for what cannot be streamed."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
        if self.wants_usage_on and not self.wants_usage:
            param = "stream_options.continuous_usage_stats"
            raise InvalidRequest(f"{param} needs stream_options.include_usage: true.", param=param)
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs cannot be streamed; send stream: false.", param="prompt_logprobs")

    def sampling(self, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """What was given, over the server's defaults. Raises InvalidRequest for a value out of range."""
        given: dict[str, Any] = {name: getattr(self, name) for name in _OWN_NAMES}
        given["max_tokens"], given["logprobs"] = max_tokens, logprobs
        given["logit_bias"] = token_bias(self.logit_bias)
        given["stop"] = (self.stop,) if isinstance(self.stop, str) else _tuple(self.stop)
        given["allowed_token_ids"], given["bad_words"] = _tuple(self.allowed_token_ids), _tuple(self.bad_words)
        given["stop_token_ids"] = _tuple(self.stop_token_ids)
        return merge(given, defaults)


def token_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """Token ids as numbers. Raises InvalidRequest for a key that is none."""
    if given is None:
        return None
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS):
            message = "logit_bias must have token ids (whole numbers) as keys."
            raise InvalidRequest(message, param=f"logit_bias.{key[:40]}")
    return {int(key): value for key, value in given.items()}


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
