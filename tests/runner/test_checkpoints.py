"""Sequences go on from checkpoints as if they had computed what they found, and harm nobody."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from driven import prompts
from plain_kernels import PlainKernels
from stepped import Hand

from vllm_mlx.core.step import Runner, Step
from vllm_mlx.runner import device

Open = Callable[..., Runner]
MODELS = ["qwen3_next", "falcon_h1", "lfm2", "mamba2", "mamba", "rwkv7", "deepseek_v3", "gemma2", "llama4", "gemma3n"]
SHARED, SUFFIX, OTHER = prompts(64, 26, 19, seed=5)
WHOLE = (*SHARED, *SUFFIX)


def first_sequence(hand: Hand, *, checkpoint: int) -> tuple[int, ...]:
    """Prefill in two chunks in slot 0, with a checkpoint between; returns the checkpoint's size and the full pages."""
    new = hand.new(0, WHOLE)
    result = hand.run(Step(0, new=(new,), prefills=(hand.prefill(0, 0, 64),), checkpoints=((0, checkpoint),)))
    assert len(result.checkpoint_bytes) == 1
    assert result.checkpoint_bytes[0] > 0
    assert hand.runner.memory().checkpoints == result.checkpoint_bytes[0]
    return hand.pages[0][:2]


@pytest.mark.parametrize("name", MODELS)
def test_sequences_go_on_from_a_checkpoint(name: str, open_runner: Open) -> None:
    check_that_sequences_go_on(open_runner(name))


@pytest.mark.skipif(device.probe().is_gpu, reason="a GPU has kernels of its own")
@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "nemotron_h"])
def test_sequences_on_kernels_go_on_from_a_checkpoint(name: str, open_runner: Open) -> None:
    check_that_sequences_go_on(open_runner(name, kernels=PlainKernels()))


def check_that_sequences_go_on(runner: Runner) -> None:
    hand = Hand(runner)
    expected, other = hand.cold(5, WHOLE, 8), hand.cold(6, (*SHARED, *OTHER), 8)
    full = first_sequence(hand, checkpoint=7)
    hand.run(Step(0, prefills=(hand.prefill(0, 64),)))
    hand.generate(0, 3)
    news = (
        hand.new(1, WHOLE, shared=full, num_cached=64, checkpoint=7),
        hand.new(2, (*SHARED, *OTHER), shared=full, num_cached=64, checkpoint=7),
    )
    hand.run(Step(0, new=news, prefills=(hand.prefill(1, 64), hand.prefill(2, 64)), decodes=hand.decode(0)))
    hand.run(Step(0, new=(hand.new(3, WHOLE, shared=full, num_cached=64, checkpoint=7),), dropped=(7,)))
    assert runner.memory().checkpoints == 0
    hand.run(Step(0, prefills=(hand.prefill(3, 64, 70),), decodes=hand.decode(0, 1, 2)))
    hand.run(Step(0, prefills=(hand.prefill(3, 70),), decodes=hand.decode(1, 2, 0)))
    for _ in range(7):
        hand.run(Step(0, decodes=hand.decode(2, 1, 0, 3)))
    for slot, tokens in ((0, expected), (1, expected), (3, expected), (2, other)):
        start = len(SHARED) + (len(OTHER) if slot == 2 else len(SUFFIX))
        assert hand.tokens[slot][start : start + 8] == tokens


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_a_decoding_batch(name: str, open_runner: Open) -> None:
    hand = Hand(open_runner(name))
    given = [SHARED[:62], (*SUFFIX, *OTHER), OTHER]
    expected = [hand.cold(5, tokens, 12) for tokens in given]
    news = tuple(hand.new(slot, tokens) for slot, tokens in enumerate(given))
    hand.run(Step(0, new=news, prefills=tuple(hand.prefill(slot, 0) for slot in range(3))))
    hand.run(Step(0, decodes=hand.decode(0, 1, 2)))
    # Slot 0 holds 64 tokens after this step.
    result = hand.run(Step(0, decodes=hand.decode(2, 0, 1), checkpoints=((0, 1), (1, 2))))
    assert len(result.checkpoint_bytes) == 2
    known, pages = hand.tokens[0][:65], hand.pages[0][:2]
    hand.run(Step(0, released=(2,), decodes=hand.decode(0, 1)))
    hand.run(Step(0, released=(0,), decodes=hand.decode(1)))
    again = hand.new(4, known, shared=pages, num_cached=64, checkpoint=1)
    hand.run(Step(0, new=(again,), prefills=(hand.prefill(4, 64),), dropped=(1, 2), decodes=hand.decode(1)))
    for _ in range(8):
        hand.run(Step(0, decodes=hand.decode(4, 1)))
    assert hand.tokens[4][62:74] == expected[0]
    assert hand.tokens[1][45:57] == expected[1]


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma2"])
def test_a_checkpoint_of_rows_serves_any_shorter_prefix(name: str, open_runner: Open) -> None:
    hand = Hand(open_runner(name))
    expected = hand.cold(5, (*SHARED[:37], *OTHER), 8)
    first_sequence(hand, checkpoint=1)
    new = hand.new(1, (*SHARED[:37], *OTHER), num_cached=37, checkpoint=1)
    hand.run(Step(0, new=(new,), prefills=(hand.prefill(1, 37),)))
    hand.generate(1, 7)
    assert hand.tokens[1][-8:] == expected


@pytest.mark.parametrize("name", ["mamba2", "deepseek_v3", "llama4"])
def test_memory_names_rows_and_checkpoints(name: str, open_runner: Open) -> None:
    runner = open_runner(name)
    hand = Hand(runner)
    assert runner.memory().rows == runner.memory().checkpoints == 0
    first_sequence(hand, checkpoint=1)
    use = runner.memory()
    assert use.rows >= use.checkpoints > 0
    hand.run(Step(0, released=(0,), dropped=(1,)))
    assert runner.memory().rows == runner.memory().checkpoints == 0


@pytest.mark.parametrize("name", ["mamba2", "deepseek_v3", "llama4", "qwen3_next"])
def test_checkpoints_hold_no_memory_but_their_own(name: str, open_runner: Open) -> None:
    runner = open_runner(name)
    hand = Hand(runner)
    first_sequence(hand, checkpoint=1)
    hand.run(Step(0, released=(0,)))
    mx.clear_cache()
    held = mx.get_active_memory()
    size = runner.memory().checkpoints
    hand.run(Step(0, dropped=(1,)))
    assert 0 <= held - mx.get_active_memory() - size < 1 << 16  # small arrays take a page each


def test_closing_frees_checkpoints(open_runner: Open) -> None:
    runner = open_runner("mamba2")
    first_sequence(Hand(runner), checkpoint=1)
    runner.close()
    assert runner.memory().checkpoints == runner.memory().rows == 0
