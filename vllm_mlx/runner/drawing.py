"""How next tokens are chosen from logits: the part of the sampler that may stand in a compiled step.

Order: temperature, min_p, top_k, top_p, draw. Parameters are arrays, so that new values never compile anything; which
operations there are is said by a `Drawing`, of which a compiled step knows a few.

Draws use the Gumbel-max trick with noise from a counter-based generator keyed by (seed, position): what a row draws
depends on its own seed, position and logits alone, not on its neighbours, its place in the batch or its past.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import msgspec
import numpy as np

from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.runner.staging import Send

NEGATIVE_INFINITY = float("-inf")
MIN_CANDIDATES = 64
WORD_BITS = 32

Draws = dict[str, mx.array]
"""Parameters of rows, each [rows, 1], but `is_greedy` and `seeds` [rows]."""


class Drawing(msgspec.Struct, frozen=True):
    """Which operations a batch of rows needs. Work that no row asks for is left out of the graph."""

    draws: bool = False
    """Some rows draw; otherwise all take the best token."""
    has_greedy: bool = True
    """Some rows take the best token."""
    has_min_p: bool = False
    has_top: bool = False
    """Some rows limit the candidates by top_k or top_p."""
    num_candidates: int | None = None
    """The most that top_k lets through, rounded up; None where a nucleus may be as large as the vocabulary."""

    @property
    def is_plain(self) -> bool:
        """Whether no row limits its candidates."""
        return not (self.has_min_p or self.has_top)

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Drawing:
        """What rows with these parameters need."""
        drawing = [p for p in params if not p.is_greedy]
        bounded = all(p.top_k > 0 or p.top_p >= 1 for p in drawing)
        largest = max((p.top_k for p in drawing if p.top_k > 0), default=MIN_CANDIDATES)
        return cls(
            draws=bool(drawing),
            has_greedy=len(drawing) < len(params),
            has_min_p=any(p.min_p > 0 for p in drawing),
            has_top=any(p.top_k > 0 or p.top_p < 1 for p in drawing),
            num_candidates=max(MIN_CANDIDATES, 1 << (largest - 1).bit_length()) if bounded else None,
        )


GREEDY = Drawing(num_candidates=MIN_CANDIDATES)
PLAIN = Drawing(draws=True, num_candidates=MIN_CANDIDATES)
COMPILED = (GREEDY, PLAIN)
"""What steps are compiled for. Filters are left out: compiling their sorts takes a GPU seconds per number of rows."""


def compiled_drawing(drawing: Drawing) -> Drawing | None:
    """The one of `COMPILED` that does what `drawing` does; None if none does."""
    if not drawing.is_plain:
        return None
    return PLAIN if drawing.draws else GREEDY


def draws_of(params: Sequence[SamplingParams], seeds: Sequence[int], *, send: Send = mx.array) -> Draws:
    """The parameters as arrays, sent together.

    They last longer than what is sent for one step, if whoever sends them needs any of them in that step.
    """
    numbers = [
        [1.0 if p.is_greedy else p.temperature for p in params],
        [0.0 if p.is_greedy else p.min_p for p in params],
        [1.0 if p.is_greedy else p.top_p for p in params],
    ]
    counts = [
        [p.is_greedy for p in params],
        [p.top_k if p.top_k > 0 and not p.is_greedy else 2**30 for p in params],
        seeds,
    ]
    words = np.concatenate([np.array(numbers, np.float32).view(np.int32), np.array(counts, np.uint32).view(np.int32)])
    sent = (send(words) + 0).view(mx.uint32)
    temperature, min_p, top_p = sent[:3].view(mx.float32)
    is_greedy, top_k, seeds_ = sent[3:]
    return {
        "is_greedy": is_greedy != 0,
        "temperature": temperature[:, None],
        "log_min_p": mx.log(min_p[:, None]),
        "top_k": top_k[:, None].astype(mx.int32),
        "top_p": top_p[:, None],
        "seeds": seeds_,
    }


def without_forbidden(logits: mx.array, words: mx.array) -> mx.array:
    """Float32 logits [rows, vocab] without the tokens that the masks uint32 [rows, words] do not allow."""
    bits = mx.array(np.left_shift(1, np.arange(WORD_BITS, dtype=np.uint32)))  # in a compiled step a constant
    allowed = ((words[:, :, None] & bits) != 0).reshape(words.shape[0], -1)[:, : logits.shape[-1]]
    return mx.where(allowed, logits, NEGATIVE_INFINITY)


def best(logits: mx.array) -> mx.array:
    """The best token of each row, int32 [rows]."""
    return mx.argmax(logits, axis=-1).view(mx.int32)


def choose(drawing: Drawing, logits: mx.array, draws: Draws, *, keys: mx.array) -> mx.array:
    """The best token of greedy rows, a draw for the others; int32 [rows].

    `logits` float32 [rows, vocab]; `keys` uint32 [rows, 2]: seeds, and positions where the chosen tokens will stand.
    """
    if not drawing.draws:
        return best(logits)
    drawn = _draw(drawing, logits, draws, keys)
    if drawing.has_greedy:
        drawn = mx.where(draws["is_greedy"], mx.argmax(logits, axis=-1), drawn)
    return drawn.view(mx.int32)  # of the same size, so that nothing is computed


def _draw(drawing: Drawing, logits: mx.array, draws: Draws, keys: mx.array) -> mx.array:
    scaled = logits / draws["temperature"]
    if drawing.has_min_p:
        least = mx.max(scaled, axis=-1, keepdims=True) + draws["log_min_p"]
        scaled = mx.where(scaled >= least, scaled, NEGATIVE_INFINITY)
    if drawing.has_top:
        least = _threshold(scaled, draws["top_k"], draws["top_p"], num_candidates=drawing.num_candidates)
        scaled = mx.where(scaled >= least, scaled, NEGATIVE_INFINITY)
    return mx.argmax(scaled + _gumbel(keys, logits.shape[-1]), axis=-1)


def _threshold(scaled: mx.array, top_k: mx.array, top_p: mx.array, *, num_candidates: int | None) -> mx.array:
    """Least logit [rows, 1] that top_k, then top_p over what top_k left, keep."""
    vocab_size = scaled.shape[-1]
    if num_candidates is not None and num_candidates < vocab_size:
        ranked = -mx.sort(-mx.topk(scaled, num_candidates, axis=-1), axis=-1)
        # A row without either filter keeps everything, candidates or not.
        unlimited = (top_k > vocab_size) & (top_p >= 1)
    else:
        ranked = -mx.sort(-scaled, axis=-1)
        unlimited = mx.zeros((scaled.shape[0], 1), mx.bool_)
    kept = mx.arange(ranked.shape[-1])[None] < top_k
    probabilities = mx.softmax(mx.where(kept, ranked, NEGATIVE_INFINITY), axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept = kept & ((before < top_p) | (top_p >= 1))
    least = mx.min(mx.where(kept, ranked, float("inf")), axis=-1, keepdims=True)
    return mx.where(unlimited, NEGATIVE_INFINITY, least)


def _gumbel(keys: mx.array, vocab_size: int) -> mx.array:
    """Gumbel noise [rows, vocab], a pure function of each row's key [rows, 2] and the token id."""
    noise: mx.array = mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)
    return noise
