"""Quantised layers that fold rows: the library's numbers and names, whatever way is taken."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from driven import prompts, run, submit
from mlx.utils import tree_flatten

from vllm_mlx.core.config import Config
from vllm_mlx.runner.quantised import (
    ALWAYS_FOLD,
    FoldedEmbedding,
    FoldedLinear,
    FoldPolicy,
    FoldRule,
    Way,
    WeightKind,
    install,
    multiply,
)

AFFINE = [("affine", 64, bits) for bits in (2, 3, 4, 5, 6, 8)]
MODES = [*AFFINE, ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
ALWAYS_PAD = FoldRule(((1, Way.PAD),))
RULES = [ALWAYS_FOLD, ALWAYS_PAD]
SHAPES = [*((rows, 1) for rows in range(1, 21)), (64, 1), (1, 2), (1, 15), (1, 40), (3, 4), (20, 3)]


class Pair(nn.Module):
    """A linear layer with a bias and an embedding that serves as output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(96, 64)
        self.proj = nn.Linear(64, 128)
        self.proj.bias = mx.random.normal((128,))


def quantised_pair(mode: str = "affine", group_size: int = 64, bits: int = 4) -> Pair:
    mx.random.seed(0)
    pair = Pair()
    nn.quantize(pair, group_size, bits, mode=mode)
    mx.eval(pair.parameters())
    return pair


@pytest.mark.parametrize("rule", RULES, ids=["fold", "pad"])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_outputs_are_the_library_s(mode: str, group_size: int, bits: int, rule: FoldRule) -> None:
    pair, plain = quantised_pair(mode, group_size, bits), quantised_pair(mode, group_size, bits)
    assert install(pair, FoldPolicy(default=rule)) == 2
    for shape in SHAPES:
        x = mx.random.normal((*shape, 64), key=mx.random.key(7))
        for ours, expected in [
            (pair.proj(x), plain.proj(x)),
            (pair.embed_tokens.as_linear(x), plain.embed_tokens.as_linear(x)),
        ]:
            assert ours.shape == expected.shape
            assert mx.allclose(ours, expected, rtol=1e-5, atol=1e-5), shape
    token_ids = mx.array([[3, 95, 0]])
    assert mx.array_equal(pair.embed_tokens(token_ids), plain.embed_tokens(token_ids))


@pytest.mark.parametrize("rule", RULES, ids=["fold", "pad"])
def test_vectors_and_matrices_are_allowed(rule: FoldRule) -> None:
    pair, plain = quantised_pair(), quantised_pair()
    install(pair, FoldPolicy(default=rule))
    for shape in [(64,), (5, 64), (2, 3, 4, 64)]:
        x = mx.random.normal(shape)
        assert mx.allclose(pair.proj(x), plain.proj(x), rtol=1e-5, atol=1e-5), shape


def seen_shape(x: mx.array, way: Way) -> tuple[int, ...]:
    """Shape of what the weight is multiplied with."""
    seen = []

    def matmul(activations: mx.array) -> mx.array:
        seen.append(activations.shape)
        return activations

    assert multiply(matmul, x, way=way).shape == x.shape
    return tuple(seen[0])


@pytest.mark.parametrize(
    ("shape", "way", "seen"),
    [
        ((8, 1, 4), Way.STRAIGHT, (8, 1, 4)),
        ((8, 1, 4), Way.FOLD, (8, 4)),
        ((8, 3, 4), Way.FOLD, (24, 4)),
        ((8, 1, 4), Way.PAD, (16, 4)),
        ((3, 1, 4), Way.PAD, (16, 4)),
        ((1, 1, 4), Way.PAD, (16, 4)),
        ((1, 5, 4), Way.PAD, (16, 4)),
        ((16, 1, 4), Way.PAD, (16, 4)),
        ((20, 1, 4), Way.PAD, (20, 4)),
        # one matrix already: nothing to do
        ((1, 1, 4), Way.FOLD, (1, 1, 4)),
        ((1, 40, 4), Way.FOLD, (1, 40, 4)),
        ((1, 40, 4), Way.PAD, (1, 40, 4)),
        ((4,), Way.FOLD, (4,)),
    ],
)
def test_a_weight_sees_one_matrix(shape: tuple[int, ...], way: Way, seen: tuple[int, ...]) -> None:
    assert seen_shape(mx.random.normal(shape), way) == seen


def test_padding_keeps_every_row_in_its_place() -> None:
    x = mx.arange(10.0).reshape(5, 1, 2)
    assert mx.array_equal(multiply(lambda matrix: matrix * 2, x, way=Way.PAD), x * 2)


def operations(module: nn.Module, rows: int) -> int:
    """Edges of the graph of one call."""
    text = io.StringIO()
    mx.export_to_dot(text, y=module(mx.zeros((rows, 1, 64))))
    return text.getvalue().count("->")


def test_folding_one_row_adds_no_operation() -> None:
    pair, plain = quantised_pair(), quantised_pair()
    install(pair, FoldPolicy(default=ALWAYS_FOLD))
    assert operations(pair.proj, 1) == operations(plain.proj, 1)
    assert operations(pair.proj, 2) > operations(plain.proj, 2)


def test_names_arrays_and_attributes_stay() -> None:
    pair, plain = quantised_pair(), quantised_pair()
    before, frozen = dict(tree_flatten(pair.parameters())), pair.trainable_parameters()
    install(pair, FoldPolicy(default=ALWAYS_FOLD))
    after = dict(tree_flatten(pair.parameters()))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert tree_flatten(pair.trainable_parameters()) == tree_flatten(frozen)
    assert type(pair.proj) is FoldedLinear
    assert isinstance(pair.proj, nn.QuantizedLinear)
    assert type(pair.embed_tokens) is FoldedEmbedding
    assert isinstance(pair.embed_tokens, nn.QuantizedEmbedding)
    for name in ("bits", "group_size", "mode", "training"):
        assert getattr(pair.proj, name) == getattr(plain.proj, name)
        assert getattr(pair.embed_tokens, name) == getattr(plain.embed_tokens, name)
    assert pair.embed_tokens.num_embeddings == 96
    assert repr(pair.proj) == repr(plain.proj).replace("QuantizedLinear", "FoldedLinear")
    pair.load_weights(list(tree_flatten(plain.parameters())))


def test_installing_draws_no_random_numbers() -> None:
    pair = quantised_pair()
    mx.random.seed(3)
    expected = mx.random.uniform()
    mx.random.seed(3)
    install(pair, FoldPolicy(default=ALWAYS_FOLD))
    assert mx.random.uniform() == expected


def test_layers_without_a_gain_are_left_alone() -> None:
    pair = quantised_pair()
    kind = WeightKind.of(pair.proj)
    assert install(pair, FoldPolicy(((kind, ALWAYS_FOLD),))) == 1
    assert type(pair.embed_tokens) is nn.QuantizedEmbedding
    assert install(quantised_pair(), FoldPolicy(default=FoldRule(((1, Way.STRAIGHT),)))) == 0


def test_subclasses_and_pure_lookups_are_left_alone() -> None:
    class Special(nn.QuantizedLinear):
        pass

    pair = quantised_pair()
    pair.proj = Special(64, 128)
    pair.embed_tokens_per_layer = nn.QuantizedEmbedding(96, 64)
    install(pair, FoldPolicy(default=ALWAYS_FOLD))
    assert type(pair.proj) is Special
    assert type(pair.embed_tokens_per_layer) is nn.QuantizedEmbedding


def test_a_rule_holds_from_its_row_count_on() -> None:
    rule = FoldRule(((1, Way.STRAIGHT), (2, Way.PAD), (8, Way.FOLD)))
    ways = {rows: rule.way(rows) for rows in (1, 2, 7, 8, 500)}
    assert ways == {1: Way.STRAIGHT, 2: Way.PAD, 7: Way.PAD, 8: Way.FOLD, 500: Way.FOLD}
    assert FoldRule(((2, Way.FOLD),)).way(1) is Way.STRAIGHT
    assert FoldRule().is_plain
    assert not rule.is_plain


def test_kinds_tell_weights_apart() -> None:
    pair = quantised_pair(bits=3)
    assert WeightKind.of(pair.proj) == WeightKind(128, 64, 3, 64, "affine")
    assert WeightKind.of(pair.embed_tokens) == WeightKind(96, 64, 3, 64, "affine")


@pytest.fixture(scope="module")
def quantised_llama(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of 4-bit weights on disk."""
    from mlx_lm.utils import load_model, quantize_model, save_model

    folder = tmp_path_factory.mktemp("quantised-llama")
    model, config = quantize_model(*load_model(tiny_model("llama")), group_size=32, bits=4)
    save_model(str(folder), model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def greedy(folder: Path, prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """The library's own tokens."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return tuple(int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=num_tokens))


@pytest.mark.parametrize("rule", RULES, ids=["fold", "pad"])
def test_a_served_model_generates_the_library_s_tokens(
    rule: FoldRule, quantised_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_mlx.runner import weights
    from vllm_mlx.runner.load import create_runner_factory

    prepare, folded = weights.prepare, []

    def prepare_and_fold(model: nn.Module, *args: Any, **settings: Any) -> list[str]:
        notes = prepare(model, *args, **settings)
        folded.append(install(model, FoldPolicy(default=rule)))
        return notes

    monkeypatch.setattr(weights, "prepare", prepare_and_fold)
    config = Config(model="llama", num_pages=64, weights_dtype="stored")
    runner = create_runner_factory(quantised_llama, config)(lambda *_: None)
    asked = prompts(5, 9, 1, 23, 40)
    answers = run(runner, [submit(str(i), prompt) for i, prompt in enumerate(asked)], config=config)
    runner.close()
    assert folded == [2 * 7 + 1]
    for i, prompt in enumerate(asked):
        assert answers[str(i)].token_ids == greedy(quantised_llama, prompt, 12)
