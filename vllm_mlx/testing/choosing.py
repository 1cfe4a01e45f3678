"""How a runner without a model chooses tokens."""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Mapping

from vllm_mlx.core.grammar import TokenMasks
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import TokenLogprobs
from vllm_mlx.testing.contract import expect


def fallback_token(tokens: tuple[int, ...], sampling: SamplingParams, vocab_size: int) -> int:
    """What follows where there is no script: a pure function of the tokens, and of the seed unless greedy."""
    seed = 0 if sampling.is_greedy else (sampling.seed or 0) % 2**32
    return zlib.crc32(array("q", tokens).tobytes(), seed) % vocab_size


def next_allowed(
    token: int, sampling: SamplingParams, allowed: bytes | None, *, num_generated: int, vocab_size: int
) -> int:
    """The token, or the first behind it that may be chosen. `allowed` has a byte per token."""
    if allowed is not None:
        return next(one for i in range(vocab_size) if allowed[one := (token + i) % vocab_size])
    stops = sampling.stop_token_ids if num_generated < sampling.min_tokens else ()
    return next(one for i in range(len(stops) + 1) if (one := (token + i) % vocab_size) not in stops)


def allowed_tokens(masks: TokenMasks, slots: tuple[int, ...], *, vocab_size: int) -> Mapping[int, bytes]:
    """A byte per token for each slot. Raises ContractError if the masks are not those of `slots`."""
    expect(masks.slots == slots, f"masks for the slots {masks.slots}, but {slots} are constrained")
    size = 4 * -(-vocab_size // 32)
    expect(len(masks.words) == size * len(slots), "a mask is not as wide as the vocabulary")
    found: dict[int, bytes] = {}
    for i, slot in enumerate(slots):
        row = masks.words[i * size :][:size]
        found[slot] = bytes(row[token // 8] >> token % 8 & 1 for token in range(vocab_size))
        expect(any(found[slot]), f"slot {slot}: a mask that allows nothing")
    return found


def halving(chosen: int, count: int, *, vocab_size: int) -> TokenLogprobs:
    """The chosen token has probability 1/2, the next candidate 1/4, and so on."""
    ranks = range(min(count, vocab_size))
    top_ids = tuple((chosen + rank) % vocab_size for rank in ranks)
    return TokenLogprobs(-math.log(2), top_ids, tuple(-math.log(2) * (rank + 1) for rank in ranks))
