"""Next tokens for all rows in one device call.

Order: penalties and bias, then as in `drawing`. Work that no row asks for is left out of the graph: a batch of greedy
rows costs one argmax.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np

from vllm_mlx.core.grammar import TokenMasks
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import NewSequence, TokenLogprobs
from vllm_mlx.runner.drawing import (
    NEGATIVE_INFINITY,
    Drawing,
    Draws,
    best,
    choose,
    compiled_drawing,
    draws_of,
    without_forbidden,
)
from vllm_mlx.runner.staging import Send

Words = np.ndarray[Any, np.dtype[np.uint32]]

PADDING = SamplingParams(temperature=0.0)
"""Of rows that are there for the shape's sake."""


class SampledRow(msgspec.Struct, frozen=True):
    """One row of the logits: whose it is and at which position its token will stand."""

    slot: int
    position: int


class Sampled(msgspec.Struct, frozen=True):
    """Lazy results of one call, in row order."""

    tokens: mx.array
    """int32 [rows], perhaps with padding behind them."""
    num_rows: int
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


@dataclass(frozen=True, eq=False)
class _Batch:
    """What stays as it is while the same slots are sampled."""

    numbers: tuple[int, ...]
    """The slots, without the padding behind them."""
    num_padded: int
    drawing: Drawing
    params: Sequence[SamplingParams]
    seeds: Words
    """Of all rows, as `params`, padding included."""
    send: Send

    @cached_property
    def draws(self) -> Draws:
        """The parameters on the device."""
        return draws_of(self.params, self.seeds.tolist(), send=self.send)

    def keys(self, positions: Sequence[int]) -> Words:
        """Of what is drawn for these positions, [rows, 2]."""
        keys = np.empty((len(positions), 2), np.uint32)
        keys[:, 0], keys[:, 1] = self.seeds, positions
        return keys


class _Slot:
    """What the sampler remembers of one sequence."""

    def __init__(self, new: NewSequence, vocab_size: int) -> None:
        params = new.sampling
        self.params = params
        self.num_prompt = new.num_prompt
        self.seed = _mix(params.seed or 0)
        self.bias_ids = mx.array(list(params.logit_bias), dtype=mx.int32) if params.logit_bias else None
        self.bias_values = mx.array(list(params.logit_bias.values())) if params.logit_bias else None
        ends_late = params.stop_token_ids and params.min_tokens
        self.stop_ids = mx.array(list(params.stop_token_ids), dtype=mx.int32) if ends_late else None
        self.counts: mx.array | None = None
        self.seen: mx.array | None = None
        if params.has_penalties:
            self.counts = _count(new.token_ids[new.num_prompt :], vocab_size)
            self.seen = _count(new.token_ids[: new.num_prompt], vocab_size) > 0

    def is_plain(self, position: int) -> bool:
        """Whether the token at `position` is chosen from the model's own logits, and no log-probability is asked."""
        if self.counts is not None or self.bias_ids is not None or self.params.logprobs is not None:
            return False
        return self.stop_ids is None or position - self.num_prompt >= self.params.min_tokens


class Sampler:
    """Keeps each slot's parameters and token counts on the device.

    With `compiles`, as on a GPU, what is often asked for is one compiled function: masks wait for tokens, and
    what chooses tokens by masks is in everybody's way.
    """

    def __init__(self, vocab_size: int, *, compiles: bool = False, send: Send = mx.array) -> None:
        self._send = send
        self._vocab_size = vocab_size
        self._compiles = compiles
        self._functions: dict[tuple[bool, bool], Callable[..., tuple[mx.array, mx.array]]] = {}
        self._slots: dict[int, _Slot] = {}
        self._batch: _Batch | None = None

    def add(self, new: NewSequence) -> None:
        """A sequence takes a slot."""
        self._slots[new.slot] = _Slot(new, self._vocab_size)
        self._batch = None

    def append(self, slot: int, token_id: int) -> None:
        """A token that was not sampled joins the slot's sequence."""
        kept = self._slots[slot]
        if kept.counts is not None:
            kept.counts = kept.counts.at[token_id].add(1)

    def remove(self, slot: int) -> None:
        """The slot's sequence is gone."""
        self._slots.pop(slot, None)
        self._batch = None

    def warm(self, dtype: mx.Dtype) -> None:
        """Compile what chooses by masks from logits of this type: it takes a GPU's compiler seconds, once a machine.

        No sequence has a slot yet.
        """
        if not self._compiles:
            return
        slots, num_words = (0, 1), -(-self._vocab_size // 32)
        masks = TokenMasks(slots, bytes([0xFF]) * (4 * num_words * len(slots)))
        logits, last_tokens = mx.zeros((len(slots), self._vocab_size), dtype), mx.zeros((len(slots),), mx.int32)
        for temperature in (0.0, 1.0):
            for slot in slots:
                self.add(NewSequence(slot, SamplingParams(temperature=temperature, seed=0), (0,), 1))
            rows = [SampledRow(slot, 1) for slot in slots]
            mx.eval(self.sample(logits, rows, last_tokens, masks=masks)[1])
            for slot in slots:
                self.remove(slot)

    def sample(
        self, logits: mx.array, rows: Sequence[SampledRow], last_tokens: mx.array, *, masks: TokenMasks | None = None
    ) -> tuple[Sampled, mx.array]:
        """Choose a token per row of `logits` [rows, vocab]; also `last_tokens` with them in their slots.

        Nothing is evaluated.
        """
        batch = self._batch_of(rows, num_padded=0)
        index, positions = self._send(np.array(batch.numbers, np.int32)), [row.position for row in rows]
        if self._compiles and masks is not None and batch.drawing.is_plain and self._are_plain(rows):
            words, keys = self._send_words(_mask_words(masks, rows)), self._send_words(batch.keys(positions))
            choose_masked = self._masked(batch.drawing)
            tokens, last_tokens = choose_masked(logits, words, batch.draws, keys, index, last_tokens)
            return Sampled(tokens, len(rows)), last_tokens
        slots = [self._slots[row.slot] for row in rows]
        logits = raw = logits.astype(mx.float32)
        logits = self._penalised(logits, slots)
        logits = _biased(logits, slots, rows)
        if masks is not None:
            logits = without_forbidden(logits, self._send_words(_mask_words(masks, rows)))
        if batch.drawing.draws:
            keys = self._send_words(batch.keys(positions))
            tokens = choose(batch.drawing, logits, batch.draws, keys=keys)
        else:
            tokens = best(logits)
        for i, slot in enumerate(slots):
            if slot.counts is not None:
                slot.counts = slot.counts.at[tokens[i]].add(1)
        last_tokens[index] = tokens
        return Sampled(tokens, len(rows), _logprobs(raw, tokens, slots)), last_tokens

    def compiled(self, rows: Sequence[SampledRow], *, num_rows: int) -> tuple[Drawing, Draws] | None:
        """What a compiled step needs to choose the tokens of `rows`, padded to `num_rows`; None if it cannot."""
        if not self._are_plain(rows):
            return None
        batch = self._batch_of(rows, num_padded=num_rows - len(rows))
        preset = compiled_drawing(batch.drawing)
        return None if preset is None else (preset, batch.draws)

    def _send_words(self, words: Words) -> mx.array:
        return self._send(words.view(np.int32)).view(mx.uint32)

    def _are_plain(self, rows: Sequence[SampledRow]) -> bool:
        return all(self._slots[row.slot].is_plain(row.position) for row in rows)

    def _masked(self, drawing: Drawing) -> Callable[..., tuple[mx.array, mx.array]]:
        """Tokens int32 [rows] of logits [rows, vocab], and the last tokens with them in their slots."""
        kind = (drawing.draws, drawing.has_greedy)
        if kind not in self._functions:

            def forward(
                logits: mx.array, words: mx.array, draws: Draws, keys: mx.array, index: mx.array, last_tokens: mx.array
            ) -> tuple[mx.array, mx.array]:
                tokens = choose(drawing, without_forbidden(logits.astype(mx.float32), words), draws, keys=keys)
                last_tokens[index] = tokens
                return tokens, last_tokens

            self._functions[kind] = mx.compile(forward)
        return self._functions[kind]

    def _batch_of(self, rows: Sequence[SampledRow], *, num_padded: int) -> _Batch:
        """Parameters of these rows and of padding behind them; kept while the same slots are sampled."""
        numbers = tuple(row.slot for row in rows)
        if self._batch is None or self._batch.numbers != numbers or self._batch.num_padded != num_padded:
            slots = [self._slots[number] for number in numbers]
            params = [slot.params for slot in slots] + [PADDING] * num_padded
            seeds = [slot.seed for slot in slots] + [0] * num_padded
            drawing = Drawing.of([slot.params for slot in slots])
            self._batch = _Batch(numbers, num_padded, drawing, params, np.array(seeds, np.uint32), self._send)
        return self._batch

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


def _mask_words(masks: TokenMasks, rows: Sequence[SampledRow]) -> Words:
    """Each row's mask, [rows, words]; rows without one may take all tokens."""
    words = np.frombuffer(masks.words, dtype="<u4").reshape(len(masks.slots), -1)
    slots = tuple(row.slot for row in rows)
    if slots == masks.slots:
        return words
    index = {slot: i for i, slot in enumerate(masks.slots)}
    all_words = np.full((len(rows), words.shape[1]), 0xFFFFFFFF, np.uint32)
    for i, slot in enumerate(slots):
        if slot in index:
            all_words[i] = words[index[slot]]
    return all_words


def _biased(logits: mx.array, slots: Sequence[_Slot], rows: Sequence[SampledRow]) -> mx.array:
    """Add logit_bias; forbid stop tokens before min_tokens."""
    for i, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        if slot.bias_ids is not None and slot.bias_values is not None:
            logits = logits.at[i, slot.bias_ids].add(slot.bias_values)
        if slot.params.is_constrained:
            continue  # its mask knows whether there is anything else left to choose
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
    if not token_ids:
        return counts
    packed = struct.pack(f"{len(token_ids)}i", *token_ids)  # five times as fast as an array of a list
    return counts.at[mx.array(np.frombuffer(packed, np.int32))].add(1)


def _mix(seed: int) -> int:
    """A 64-bit seed as 32 well-mixed bits (finaliser of SplitMix64, Steele et al. 2014)."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 32
