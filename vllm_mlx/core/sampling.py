"""How the next token is chosen: the one record that every dialect's fields are translated into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_mlx.core.errors import InvalidRequest

MAX_TOP_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of one request, validated on construction.

    Order of application: penalties and bias, temperature, then min_p, top_k, top_p (OpenAI's order: the
    temperature comes before the filters). Penalties follow OpenAI (`frequency`, `presence`: generated tokens
    only) and the CTRL paper, arXiv:1909.05858 (`repetition`: prompt and generated tokens).

    Raises:
        InvalidRequest: a value is out of range; `param` is the field's name.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    """Token id to a value added to its logit, -100 to 100."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these are chosen; the text ends by itself only if they have a token that ends it. None: all."""
    bad_words: tuple[str, ...] = ()
    """Texts that the output must not have."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """The same in tokens: the last one of each is not chosen right behind the others."""
    seed: int | None = None
    """The same seed gives the same tokens, alone or in a batch. None draws one per request."""
    max_tokens: int | None = None
    """None means: as many as the context leaves."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be chosen before this many tokens."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    """Strings matched on the text; generation ends before the first of them."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string that was found, or with the text of the stop token."""
    skip_special_tokens: bool = True
    """Whether tokens that only structure the conversation are left out of the text."""
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """None: no log-probabilities. 0: of the chosen token. k: also of the k most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, which is then computed from its first token on."""
    grammar: str | None = None
    """What the text must look like, in llguidance's serialised form. Applied after penalties and bias, before all that
    limits the candidates; `min_tokens` yields where the text can only end, and `ignore_eos` where it has ended."""
    grammar_yields: bool = False
    """Whether the output goes on without the grammar where it cannot be followed (no tokenizer, or a limit was met),
    rather than end with an error."""

    def __post_init__(self) -> None:
        _whole("n", self.n, 1, 128)
        _in_range("temperature", self.temperature, 0.0, 2.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, -1, 2**31 - 1)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, -math.inf, math.inf)
        for token in self.allowed_token_ids or ():
            _whole("allowed_token_ids", token, -math.inf, math.inf)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, -math.inf, math.inf)
            _in_range(f"logit_bias.{token}", bias, -100.0, 100.0)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _whole("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if any(not text for text in self.stop):
            raise InvalidRequest("stop must not contain an empty string.", param="stop")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty: no token is left.", param="allowed_token_ids")
        if any(not word.strip() for word in self.bad_words):
            raise InvalidRequest("bad_words must not contain an empty text.", param="bad_words")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if self.prompt_logprobs is not None:
            _whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change later logits."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def is_constrained(self) -> bool:
        """Whether what was written decides which tokens may follow, so that each is chosen from a mask."""
        return self.grammar is not None or self.allowed_token_ids is not None or bool(self.bad_word_ids)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        return msgspec.structs.replace(self, **changes)


def merge(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """Build parameters from what a request gave (None: not given) over the server's defaults."""
    chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    return SamplingParams(**chosen)


def _in_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise InvalidRequest unless low <= value <= high (low < value if open_low) and value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number, not {type(value).__name__}.", param=name)
    if not low <= value <= high or (open_low and value <= low):
        least = f"greater than {low}" if open_low else f"at least {low}"
        raise InvalidRequest(f"{name} must be {least} and at most {high}, not {value}.", param=name)


def _whole(name: str, value: float, low: float, high: float) -> None:
    """Raise InvalidRequest unless `value` is an integer, not merely equal to one, and low <= value <= high."""
    _in_range(name, value, low, high)
    if not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number, not {value}.", param=name)
