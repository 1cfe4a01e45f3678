"""The sampler against plain reference arithmetic in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from vllm_mlx.core.grammar import TokenMasks
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import NewSequence
from vllm_mlx.runner.sampler import Sampled, SampledRow, Sampler

VOCAB = 300


def logits(num_rows: int, *, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, VOCAB)).astype(np.float32) * scale


def sampler_of(
    *params: SamplingParams, token_ids: Sequence[int] = (5, 6, 7), num_prompt: int = 3, compiles: bool = False
) -> Sampler:
    sampler = Sampler(VOCAB, compiles=compiles)
    for slot, one in enumerate(params):
        sampler.add(NewSequence(slot, one, tuple(token_ids), num_prompt))
    return sampler


def rows_at(position: int, num_rows: int) -> list[SampledRow]:
    return [SampledRow(slot, position) for slot in range(num_rows)]


def sample(sampler: Sampler, values: np.ndarray, rows: list[SampledRow], masks: TokenMasks | None = None) -> Sampled:
    """Also sees that the tokens get into their slots, and nothing else changes."""
    before = [-1 - slot for slot in range(2 + max(row.slot for row in rows))]
    sampled, last_tokens = sampler.sample(mx.array(values), rows, mx.array(before), masks=masks)
    chosen = dict(zip((row.slot for row in rows), sampled.tokens.tolist(), strict=True))
    assert last_tokens.tolist() == [chosen.get(slot, value) for slot, value in enumerate(before)]
    return sampled


def draw(sampler: Sampler, values: np.ndarray, *, position: int = 3) -> list[int]:
    tokens: list[int] = sample(sampler, values, rows_at(position, len(values))).tokens.tolist()
    return tokens


def drawn_set(params: SamplingParams, values: np.ndarray, *, num_draws: int = 400) -> set[int]:
    """All tokens that many positions draw from one row of logits."""
    sampler = sampler_of(*[params] * 50)
    rows = np.repeat(values[None], 50, axis=0)
    found: set[int] = set()
    for start in range(0, num_draws, 50):
        positions = [SampledRow(slot, start + slot) for slot in range(50)]
        found |= set(sample(sampler, rows, positions).tokens.tolist())
    return found


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values.astype(np.float64) - values.max())
    return powers / powers.sum()


def nucleus(values: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Token ids that top_k and then top_p keep."""
    order = np.argsort(-values)[: top_k or None]
    probabilities = softmax(values[order])
    before = np.cumsum(probabilities) - probabilities
    return {int(token) for token, mass in zip(order, before, strict=True) if mass < top_p}


def test_greedy_takes_the_most_likely_token() -> None:
    values = logits(4)
    assert draw(sampler_of(*[SamplingParams(temperature=0.0)] * 4), values) == values.argmax(axis=-1).tolist()


def test_greedy_and_drawing_rows_share_a_step() -> None:
    values = logits(3)
    hot = SamplingParams(temperature=2.0, seed=9)
    tokens = draw(sampler_of(SamplingParams(temperature=0.0), hot, SamplingParams(temperature=0.0)), values)
    assert tokens[0] == values[0].argmax()
    assert tokens[2] == values[2].argmax()


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 1.0), (0, 0.5), (0, 0.9), (20, 0.7), (1, 1.0), (0, 0.001), (VOCAB + 5, 0.8)]
)
def test_draws_stay_within_top_k_and_top_p(top_k: int, top_p: float) -> None:
    values = logits(1)[0]
    found = drawn_set(SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=3), values)
    expected = nucleus(values, top_k, top_p)
    assert found <= expected
    assert len(found) >= min(len(expected), 4)


def test_top_p_comes_after_the_temperature() -> None:
    values = logits(1)[0]
    found = drawn_set(SamplingParams(temperature=0.25, top_p=0.6, seed=3), values)
    assert found <= nucleus(values / 0.25, 0, 0.6)


def test_min_p_drops_tokens_far_below_the_best() -> None:
    values = logits(1)[0]
    probabilities = softmax(values)
    expected = set(np.flatnonzero(probabilities >= 0.2 * probabilities.max()).tolist())
    assert drawn_set(SamplingParams(min_p=0.2, seed=1), values) <= expected


def test_a_row_without_filters_is_not_filtered_by_its_neighbours() -> None:
    values = np.zeros((2, VOCAB), np.float32)
    narrow, wide = SamplingParams(top_k=2, seed=1), SamplingParams(seed=2)
    sampler = sampler_of(narrow, wide)
    found = {draw(sampler, values, position=position)[1] for position in range(300)}
    assert len(found) > 64


def test_frequencies_follow_the_probabilities() -> None:
    values = np.full(VOCAB, -1e9, np.float32)
    values[:4] = np.log([0.5, 0.25, 0.15, 0.1])
    sampler = sampler_of(*[SamplingParams(seed=seed) for seed in range(200)])
    rows = np.repeat(values[None], 200, axis=0)
    counts = np.zeros(4)
    for position in range(20):
        counts += np.bincount(draw(sampler, rows, position=position), minlength=4)
    assert np.abs(counts / counts.sum() - [0.5, 0.25, 0.15, 0.1]).max() < 0.03


def test_a_draw_depends_on_seed_and_position_only() -> None:
    values = logits(1)[0]
    params = SamplingParams(temperature=1.5, seed=42)
    alone = [draw(sampler_of(params), values[None], position=position)[0] for position in range(20)]
    others = [SamplingParams(temperature=0.5 + 0.1 * i, seed=i, top_p=0.9) for i in range(5)]
    sampler = sampler_of(*others, params)
    crowd = np.concatenate([logits(5, seed=8), values[None]])
    assert [draw(sampler, crowd, position=position)[5] for position in range(20)] == alone
    assert len(set(alone)) > 5
    other_seed = params.replace(seed=43)
    assert [draw(sampler_of(other_seed), values[None], position=position)[0] for position in range(20)] != alone


def test_penalties_match_the_reference() -> None:
    values = logits(1)
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.6, presence_penalty=0.4, logprobs=0
    )
    prompt, output = [10, 11, 11], [20, 20, 21]
    expected = values[0].copy()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token in output:
        expected[token] -= 0.6
    for token in set(output):
        expected[token] -= 0.4
    sampler = sampler_of(params, token_ids=(*prompt, *output), num_prompt=3)
    # Make the penalised tokens the contenders, so that a wrong penalty changes the choice.
    for token in (10, 11, 20, 21):
        raised = values.copy()
        raised[0, token] += expected.max() - expected[token] + 0.01
        again = expected.copy()
        again[token] = raised[0, token] / 1.7 if raised[0, token] > 0 else raised[0, token] * 1.7
        again[token] -= 0.6 * output.count(token) + 0.4 * (token in output)
        fresh = sampler_of(params, token_ids=(*prompt, *output), num_prompt=3)
        assert draw(fresh, raised)[0] == again.argmax()
    assert draw(sampler, values)[0] == expected.argmax()


def test_generated_tokens_are_counted_as_they_come() -> None:
    values = np.zeros((1, VOCAB), np.float32)
    values[0, [3, 4, 5]] = [1.0, 0.9, 0.8]
    sampler = sampler_of(SamplingParams(temperature=0.0, frequency_penalty=1.0), token_ids=(9,), num_prompt=1)
    assert [draw(sampler, values, position=position)[0] for position in range(1, 4)] == [3, 4, 5]


def test_logit_bias_moves_the_choice() -> None:
    values = logits(2)
    sampler = sampler_of(SamplingParams(temperature=0.0, logit_bias={17: 100.0}), SamplingParams(temperature=0.0))
    assert draw(sampler, values) == [17, int(values[1].argmax())]


def test_a_forbidden_token_is_never_drawn() -> None:
    values = np.zeros(VOCAB, np.float32)
    values[7] = 20.0
    assert 7 not in drawn_set(SamplingParams(logit_bias={7: -100.0}, seed=1), values)


def test_stop_tokens_wait_for_min_tokens() -> None:
    values = np.zeros((1, VOCAB), np.float32)
    values[0, 2] = 5.0
    values[0, 8] = 4.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(2,))
    sampler = sampler_of(params, token_ids=(1, 1, 1), num_prompt=3)
    assert [draw(sampler, values, position=position)[0] for position in (3, 4, 5)] == [8, 8, 2]


def test_log_probabilities_are_the_model_s_own() -> None:
    values = logits(3)
    asking = SamplingParams(temperature=0.7, top_k=3, logprobs=5, seed=1, logit_bias={1: 50.0})
    sampler = sampler_of(asking, SamplingParams(), asking.replace(logprobs=0))
    sampled = sample(sampler, values, rows_at(3, 3))
    assert sampled.logprobs is not None
    first, second, third = sampled.logprobs.collect(3)
    tokens = sampled.tokens.tolist()
    expected = np.log(softmax(values[0]))
    best = np.argsort(-expected)[:5]
    assert first is not None
    assert first.logprob == pytest.approx(expected[tokens[0]], abs=1e-4)
    assert first.top_ids == tuple(best.tolist())
    assert first.top_logprobs == pytest.approx(expected[best].tolist(), abs=1e-4)
    assert second is None
    assert third is not None
    assert third.top_ids == ()


def test_nothing_is_computed_that_nobody_asked_for() -> None:
    sampled = sample(sampler_of(SamplingParams(temperature=0.0)), logits(1), rows_at(3, 1))
    assert sampled.logprobs is None


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_masked_row_takes_allowed_tokens_and_its_neighbours_what_they_took_before(
    temperature: float, top_p: float, compiles: bool
) -> None:
    params = SamplingParams(temperature=temperature, seed=4, top_p=top_p)
    values = logits(3)
    free = draw(sampler_of(params, params, params), values)
    vocab_size = values.shape[1]
    allowed = {int(values[1].argmin()), (int(values[1].argmin()) + 33) % vocab_size}
    size = 4 * -(-vocab_size // 32)
    masks = TokenMasks((1,), sum(1 << token for token in allowed).to_bytes(size, "little"))
    sampler = sampler_of(params, params, params, compiles=compiles)
    found = sample(sampler, values, rows_at(3, 3), masks).tokens.tolist()
    assert found[1] in allowed
    assert [found[0], found[2]] == [free[0], free[2]]


def test_a_warm_sampler_has_compiled_both_kinds_and_remembers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[object] = []
    compiled = mx.compile
    monkeypatch.setattr(mx, "compile", lambda function: (traced.append(function), compiled(function))[1])
    sampler = Sampler(VOCAB, compiles=True)
    sampler.warm(mx.float32)
    assert len(traced) == 2
    params = SamplingParams(temperature=0.8, seed=4)
    masks = TokenMasks((0,), (0b1011).to_bytes(4 * -(-VOCAB // 32), "little"))
    sampler.add(NewSequence(0, params, (1,), 1))
    found = sample(sampler, logits(1), rows_at(9, 1), masks).tokens.tolist()
    assert found == sample(sampler_of(params), logits(1), rows_at(9, 1), masks).tokens.tolist()
    assert len(traced) == 2


def test_masked_rows_are_drawn_alike_in_a_compiled_function_whoever_takes_the_best_token() -> None:
    draws, greedy = SamplingParams(temperature=0.8, seed=4), SamplingParams(temperature=0.0)
    values, words = logits(3), b"".join(number.to_bytes(4 * -(-VOCAB // 32), "little") for number in (0b1011, 7 << 5))
    masks = TokenMasks((0, 2), words)
    for params in ([draws] * 3, [draws, greedy, draws], [greedy] * 3):
        found = [
            sample(sampler_of(*params, compiles=compiles), values, rows_at(9, 3), masks).tokens.tolist()
            for compiles in (False, True)
        ]
        assert found[0] == found[1]
        assert found[0][0] in {0, 1, 3}
        assert found[0][2] in {5, 6, 7}
