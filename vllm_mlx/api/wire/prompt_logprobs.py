"""Log-probabilities of prompts, in the shape of vLLM's extension."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from vllm_mlx.core.events import PromptToken


class PromptLogprobAnswer(msgspec.Struct, frozen=True):
    """One candidate at one place of the prompt."""

    logprob: float
    rank: int | None
    """1 is the most likely one."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprobAnswer] | None]
"""For each token of the prompt, by token id: itself and the most likely ones; null for the first token."""


def prompt_logprobs(tokens: Sequence[PromptToken], *, count: int | None) -> PromptLogprobs | UnsetType:
    """The answer's field; nothing unless `count` says how many candidates were asked for."""
    return UNSET if count is None else [_place(token, count) for token in tokens]


def _place(token: PromptToken, count: int) -> dict[str, PromptLogprobAnswer] | None:
    if token.logprob is None:
        return None
    top = list(zip(token.top_ids, token.top, strict=True))[:count]
    found = {str(i): PromptLogprobAnswer(t.logprob, rank, t.token) for rank, (i, t) in enumerate(top, start=1)}
    found[str(token.token_id)] = PromptLogprobAnswer(token.logprob, token.rank, token.token)
    return found
