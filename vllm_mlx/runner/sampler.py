"""Next tokens for all rows in one device call.

Order: penalties and bias, temperature, min_p, top_k, top_p, draw. Work that no row asks for is left out of the graph:
a batch of greedy rows costs one argmax. Parameters are arrays, so that new values never compile anything.

Draws use the Gumbel-max trick with noise from a counter-based generator keyed by (seed, position): what a row draws
depends on its own seed, position and logits alone, not on its neighbours, its place in the batch or its past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import msgspec

from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import NewSequence, TokenLogprobs

NEGATIVE_INFINITY = float("-inf")
MIN_CANDIDATES = 64


class SampledRow(msgspec.Struct, frozen=True):
    """One row of the logits: whose it is and at which position its token will stand."""

    slot: int
    position: int


class Sampled(msgspec.Struct, frozen=True):
    """Lazy results of one call, in row order."""

    tokens: mx.array
    """int32 [rows]."""
    logprobs: _LazyLogprobs | None = None


class _LazyLogprobs(msgspec.Struct, frozen=True):
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    """How many alternatives each of `rows` asked for."""
    chosen: mx.array
    """[len(rows)]."""
    top_ids: mx.array | None
    """[len(rows), most alternatives], most likely first."""
    top: mx.array | None

    def collect(self, num_rows: int) -> tuple[TokenLogprobs | None, ...]:
        """Plain numbers; None for rows that did not ask."""
        found: list[TokenLogprobs | None] = [None] * num_rows
        chosen: Any = self.chosen.tolist()
        ids: Any = self.top_ids.tolist() if self.top_ids is not None else [()] * len(self.rows)
        top: Any = self.top.tolist() if self.top is not None else [()] * len(self.rows)
        for i, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            found[row] = TokenLogprobs(chosen[i], tuple(ids[i][:count]), tuple(top[i][:count]))
        return tuple(found)


class _Slot:
    """What the sampler remembers of one sequence."""

    def __init__(self, new: NewSequence, vocab_size: int) -> None:
        params = new.sampling
        self.params = params
        self.num_prompt = new.num_prompt
        self.seed = _mix(params.seed or 0)
        self.bias_ids = mx.array(list(params.logit_bias), dtype=mx.int32) if params.logit_bias else None
        self.bias_values = mx.array(list(params.logit_bias.values())) if params.logit_bias else None
        self.stop_ids = mx.array(list(params.stop_token_ids), dtype=mx.int32) if params.stop_token_ids else None
        self.counts: mx.array | None = None
        self.seen: mx.array | None = None
        if params.has_penalties:
            self.counts = _count(new.token_ids[new.num_prompt :], vocab_size)
            self.seen = _count(new.token_ids[: new.num_prompt], vocab_size) > 0


class Sampler:
    """Keeps each slot's parameters and token counts on the device."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: dict[int, _Slot] = {}
        self._parameters: tuple[tuple[int, ...], _Parameters] | None = None

    def add(self, new: NewSequence) -> None:
        """A sequence takes a slot."""
        self._slots[new.slot] = _Slot(new, self._vocab_size)
        self._parameters = None

    def remove(self, slot: int) -> None:
        """The slot's sequence is gone."""
        self._slots.pop(slot, None)
        self._parameters = None

    def sample(self, logits: mx.array, rows: Sequence[SampledRow]) -> Sampled:
        """Choose a token per row of `logits` [rows, vocab]. Nothing is evaluated."""
        slots = [self._slots[row.slot] for row in rows]
        logits = raw = logits.astype(mx.float32)
        logits = self._penalised(logits, slots)
        logits = _biased(logits, slots, rows)
        parameters = self._parameters_of(rows, slots)
        tokens = parameters.choose(logits, rows).astype(mx.int32)
        for i, slot in enumerate(slots):
            if slot.counts is not None:
                slot.counts = slot.counts.at[tokens[i]].add(1)
        return Sampled(tokens, _logprobs(raw, tokens, slots))

    def _parameters_of(self, rows: Sequence[SampledRow], slots: Sequence[_Slot]) -> _Parameters:
        """Arrays for these rows; kept while the same slots are sampled."""
        key = tuple(row.slot for row in rows)
        if self._parameters is None or self._parameters[0] != key:
            self._parameters = (key, _Parameters([slot.params for slot in slots], [slot.seed for slot in slots]))
        return self._parameters[1]

    def _penalised(self, logits: mx.array, slots: Sequence[_Slot]) -> mx.array:
        """Repetition (multiplicative, CTRL), frequency and presence penalties (additive, OpenAI)."""
        if not any(slot.params.has_penalties for slot in slots):
            return logits
        zeros = mx.zeros((self._vocab_size,), mx.int32)
        counts = mx.stack([zeros if slot.counts is None else slot.counts for slot in slots])
        seen = mx.stack([zeros > 0 if slot.seen is None else slot.seen for slot in slots]) | (counts > 0)
        repetition, frequency, presence = (
            mx.array([[getattr(slot.params, f"{name}_penalty")] for slot in slots])
            for name in ("repetition", "frequency", "presence")
        )
        repeated = mx.where(logits > 0, logits / repetition, logits * repetition)
        logits = mx.where(seen, repeated, logits)
        return logits - counts * frequency - (counts > 0) * presence


class _Parameters:
    """Sampling parameters of a set of rows, as arrays [rows, 1]."""

    def __init__(self, params: Sequence[SamplingParams], seeds: Sequence[int]) -> None:
        self._num_greedy = sum(p.is_greedy for p in params)
        self._is_greedy = mx.array([p.is_greedy for p in params])
        column = partial(_column, params)
        self._temperature = column(lambda p: 1.0 if p.is_greedy else p.temperature)
        self._log_min_p = self._top_k = self._top_p = None
        drawing = [p for p in params if not p.is_greedy]
        if any(p.min_p > 0 for p in drawing):
            self._log_min_p = mx.log(column(lambda p: p.min_p))
        if any(p.top_k > 0 or p.top_p < 1 for p in drawing):
            self._top_k = column(lambda p: p.top_k if p.top_k > 0 and not p.is_greedy else 2**30)
            self._top_p = column(lambda p: 1.0 if p.is_greedy else p.top_p)
        # Without a top_k, a nucleus may be as large as the vocabulary.
        bounded = all(p.top_k > 0 or p.top_p >= 1 for p in drawing)
        largest = max((p.top_k for p in drawing if p.top_k > 0), default=MIN_CANDIDATES)
        self._num_candidates = max(MIN_CANDIDATES, 1 << (largest - 1).bit_length()) if bounded else None
        self._seeds = mx.array(list(seeds), dtype=mx.uint32)

    def choose(self, logits: mx.array, rows: Sequence[SampledRow]) -> mx.array:
        """The best token of greedy rows, a draw for the others; token ids [rows]."""
        if self._num_greedy == 0:
            return self._draw(logits, rows)
        best = mx.argmax(logits, axis=-1)
        return best if self._num_greedy == len(rows) else mx.where(self._is_greedy, best, self._draw(logits, rows))

    def _draw(self, logits: mx.array, rows: Sequence[SampledRow]) -> mx.array:
        """A draw per row of `logits` [rows, vocab]; token ids [rows]."""
        scaled = logits / self._temperature
        if self._log_min_p is not None:
            least = mx.max(scaled, axis=-1, keepdims=True) + self._log_min_p
            scaled = mx.where(scaled >= least, scaled, NEGATIVE_INFINITY)
        if self._top_k is not None and self._top_p is not None:
            scaled = mx.where(scaled >= self._threshold(scaled), scaled, NEGATIVE_INFINITY)
        positions = mx.array([row.position for row in rows], dtype=mx.uint32)
        return mx.argmax(scaled + _gumbel(mx.stack([self._seeds, positions], axis=-1), logits.shape[-1]), axis=-1)

    def _threshold(self, scaled: mx.array) -> mx.array:
        """Least logit [rows, 1] that top_k, then top_p over what top_k left, keep."""
        assert self._top_k is not None
        assert self._top_p is not None
        vocab_size = scaled.shape[-1]
        if self._num_candidates is not None and self._num_candidates < vocab_size:
            ranked = -mx.sort(-mx.topk(scaled, self._num_candidates, axis=-1), axis=-1)
            # A row without either filter keeps everything, candidates or not.
            unlimited = (self._top_k > vocab_size) & (self._top_p >= 1)
        else:
            ranked = -mx.sort(-scaled, axis=-1)
            unlimited = mx.zeros((scaled.shape[0], 1), mx.bool_)
        kept = mx.arange(ranked.shape[-1])[None] < self._top_k
        probabilities = mx.softmax(mx.where(kept, ranked, NEGATIVE_INFINITY), axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        kept = kept & ((before < self._top_p) | (self._top_p >= 1))
        least = mx.min(mx.where(kept, ranked, float("inf")), axis=-1, keepdims=True)
        return mx.where(unlimited, NEGATIVE_INFINITY, least)


def _column(params: Sequence[SamplingParams], value: Callable[[SamplingParams], float]) -> mx.array:
    return mx.array([[value(p)] for p in params])


def _gumbel(keys: mx.array, vocab_size: int) -> mx.array:
    """Gumbel noise [rows, vocab], a pure function of each row's key [rows, 2] and the token id."""
    noise: mx.array = mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)
    return noise


def _biased(logits: mx.array, slots: Sequence[_Slot], rows: Sequence[SampledRow]) -> mx.array:
    """Add logit_bias; forbid stop tokens before min_tokens."""
    for i, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        if slot.bias_ids is not None and slot.bias_values is not None:
            logits = logits.at[i, slot.bias_ids].add(slot.bias_values)
        if slot.stop_ids is not None and row.position - slot.num_prompt < slot.params.min_tokens:
            logits = logits.at[i, slot.stop_ids].add(NEGATIVE_INFINITY)
    return logits


def _logprobs(raw: mx.array, tokens: mx.array, slots: Sequence[_Slot]) -> _LazyLogprobs | None:
    """Log-probabilities of the model itself, for the rows that asked."""
    asked = [(i, slot.params.logprobs) for i, slot in enumerate(slots) if slot.params.logprobs is not None]
    if not asked:
        return None
    rows, counts = zip(*asked, strict=True)
    index = mx.array(rows)
    logits = raw[index]
    normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[index][:, None], axis=-1) - normaliser
    most = max(counts)
    if most == 0:
        return _LazyLogprobs(rows, counts, chosen[:, 0], None, None)
    top_ids = mx.argpartition(-logits, most, axis=-1)[:, :most]
    top = mx.take_along_axis(logits, top_ids, axis=-1) - normaliser
    order = mx.argsort(-top, axis=-1)
    top_ids, top = mx.take_along_axis(top_ids, order, axis=-1), mx.take_along_axis(top, order, axis=-1)
    return _LazyLogprobs(rows, counts, chosen[:, 0], top_ids, top)


def _count(token_ids: Sequence[int], vocab_size: int) -> mx.array:
    """How often each token occurs, int32 [vocab]."""
    counts = mx.zeros((vocab_size,), mx.int32)
    return counts.at[mx.array(list(token_ids), dtype=mx.int32)].add(1) if token_ids else counts


def _mix(seed: int) -> int:
    """A 64-bit seed as 32 well-mixed bits (finaliser of SplitMix64, Steele et al. 2014)."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 32
