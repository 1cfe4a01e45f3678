"""Imaginary log-probabilities of prompts."""

from __future__ import annotations

import math

import msgspec

from vllm_mlx.core.step import PrefillRow, PromptLogprobs
from vllm_mlx.testing.choosing import halving
from vllm_mlx.testing.held import Slot


def prompt_logprobs(row: PrefillRow, slot: Slot, *, vocab_size: int) -> PromptLogprobs | None:
    """Of the prompt tokens that follow a chunk's tokens; None if none are asked or there are none.

    A token is the most likely one if the token before it is even, else the second; see `halving`.
    """
    count, start = slot.sampling.prompt_logprobs, row.start + 1
    end = min(slot.num_prompt, start + len(row.token_ids))
    if count is None or start >= end:
        return None
    ranks, found = tuple(1 + token_id % 2 for token_id in slot.token_ids[start - 1 : end - 1]), []
    for token_id, rank in zip(slot.token_ids[start:end], ranks, strict=True):
        likely = halving((token_id - rank + 1) % vocab_size, count, vocab_size=vocab_size)
        found.append(msgspec.structs.replace(likely, logprob=-math.log(2) * rank))
    return PromptLogprobs(start, tuple(found), ranks)
