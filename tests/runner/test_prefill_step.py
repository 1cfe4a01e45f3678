"""Short prompts computed side by side, padded, give the tokens that each gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from driven import assert_same, prompts, run, submit
from plain_kernels import PlainKernels

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import PrefillRow, Runner
from vllm_mlx.engine.pace import PrefillPace
from vllm_mlx.runner import device, suffixes
from vllm_mlx.runner.prefill_step import LENGTHS, PrefillStep

Open = Callable[..., Runner]

pytestmark = pytest.mark.skipif(device.probe().is_gpu, reason="a GPU has kernels of its own, and compiles its steps")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of every pass, padding included."""
    seen: list[tuple[int, int]] = []
    forward = PrefillStep._forward

    def recorded(self: PrefillStep, token_ids: Any, *rest: Any) -> Any:
        seen.append(token_ids.shape)
        return forward(self, token_ids, *rest)

    monkeypatch.setattr(PrefillStep, "_forward", recorded)
    return seen


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "phi3", "cohere2"])
def test_prompts_together_give_the_tokens_of_each_alone(
    name: str, open_runner: Open, shapes: list[tuple[int, int]]
) -> None:
    submits = [submit(str(i), p, seed=i) for i, p in enumerate(prompts(5, 40, 32, 70, 33, 3, 100))]
    expected = run(open_runner(name), submits, config=Config(prefix_cache=False))
    assert not shapes
    runner = open_runner(name, kernels=PlainKernels(), max_num_seqs=8)
    del shapes[:]  # of warming
    found = run(runner, submits, config=Config(max_num_seqs=8, prefill_step_size=512))
    assert_same(found, expected)
    assert shapes == [(8, 128)]


def test_long_prompts_and_later_chunks_are_computed_alone(open_runner: Open, shapes: list[tuple[int, int]]) -> None:
    submits = [submit(str(i), p) for i, p in enumerate(prompts(600, 70))]
    submits.append(submit("again", submits[1].prompt.token_ids))
    expected = run(open_runner("llama"), submits, config=Config(prefix_cache=False))
    runner = open_runner("llama", kernels=PlainKernels(), max_num_seqs=4)
    del shapes[:]
    assert_same(run(runner, submits, config=Config(prefill_step_size=1024, max_num_seqs=4)), expected)
    assert shapes == [(1, 96)]


@pytest.mark.parametrize(("cuts", "together"), [((0, 0, 0, 0), [4]), ((0, 1, 2, 3), [4]), ((0, 0, 1, 2), [2, 2])])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "phi3", "cohere2"])
def test_suffixes_together_give_the_tokens_of_each_alone(
    name: str, cuts: tuple[int, ...], together: list[int], open_runner: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, *ends = prompts(150, 7, 20, 1, 33)
    first = submit("first", prefix)
    others = [submit(str(i), [*prefix[: 140 - 32 * cuts[i]], *end], seed=i) for i, end in enumerate(ends)]
    expected = run(open_runner(name), [first, *others], config=Config(prefix_cache=False))
    sizes: list[int] = []
    compute = suffixes.logits
    monkeypatch.setattr(suffixes, "logits", lambda *args: (sizes.append(len(args[-1])), compute(*args))[1])
    runner = open_runner(name, kernels=PlainKernels(), max_num_seqs=8)
    # The others are planned while the first is computed, when it is not known yet what a token costs.
    monkeypatch.setattr(PrefillPace, "budget", lambda self, **_: self.max_tokens)
    found = run(runner, [first, *others], config=Config(max_num_seqs=8, prefill_step_size=512))
    assert_same(found, expected)
    assert sizes == together


def test_suffixes_of_different_prefixes_of_one_length_are_computed_together(open_runner: Open) -> None:
    one, other, *ends = prompts(96, 96, 7, 20)
    firsts = [submit("one", one), submit("other", other)]
    later = [submit(str(i), [*prefix, *end]) for i, (prefix, end) in enumerate(zip((one, other), ends, strict=True))]
    expected = run(open_runner("llama"), [*firsts, *later], config=Config(prefix_cache=False))
    runner = open_runner("llama", kernels=PlainKernels(), max_num_seqs=8)
    config = Config(max_num_seqs=8, prefill_step_size=512)
    assert_same(run(runner, [*firsts, *later], config=config), expected)


def test_groups_of_suffixes_are_bounded() -> None:
    def row(slot: int, start: int, count: int, *, first_page: int = 1) -> PrefillRow:
        num_pages = 1 + (start + count) // 32
        return PrefillRow(slot, start, (1,) * count, tuple(range(first_page, first_page + num_pages)), True)

    def sizes(*rows: PrefillRow) -> list[int]:
        return [len(group) for group in suffixes.groups(rows)]

    assert sizes(*(row(i, 64, 20) for i in range(10))) == [10]
    assert sizes(*(row(i, 64, 20) for i in range(70))) == [64, 6]
    assert sizes(*(row(i, 64, 600) for i in range(4))) == [2, 2]
    assert sizes(*(row(i, 64, 100) for i in range(20))) == [16, 4]
    assert sizes(*(row(i, 64, 20, first_page=1 + 10 * i) for i in range(10))) == [8, 2]
    assert sizes(row(0, 64, 20), row(1, 40_000, 20)) == []
    assert sizes(row(0, 64, 600), row(1, 64, 600, first_page=100)) == []
    assert sizes(row(0, 64, 1100), row(1, 64, 1100)) == []
    assert sizes(row(0, 0, 20), row(1, 0, 20)) == []


def test_quantised_prompts_are_computed_alone(open_runner: Open, shapes: list[tuple[int, int]]) -> None:
    runner = open_runner("llama", kernels=PlainKernels(), kv_cache_dtype="int8")
    run(runner, [submit("a", prompts(20)[0])], config=Config())
    assert not shapes


def test_every_shape_is_warmed_once(open_runner: Open, shapes: list[tuple[int, int]]) -> None:
    open_runner("llama", kernels=PlainKernels())
    counts = {1: len(LENGTHS), 4: 8, 8: 6}
    assert sorted(shapes) == sorted((rows, length) for rows, n in counts.items() for length in LENGTHS[:n])


def test_chunks_that_do_not_end_their_prompt_are_not_taken() -> None:
    whole = PrefillRow(0, 0, (1, 2, 3), (1,), True)
    assert PrefillStep.takes(whole)
    assert not PrefillStep.takes(PrefillRow(0, 0, (1, 2, 3), (1,), False))
    assert not PrefillStep.takes(PrefillRow(0, 32, (1, 2, 3), (1, 2), True))
    assert not PrefillStep.takes(PrefillRow(0, 0, (1,) * (LENGTHS[-1] + 1), tuple(range(1, 18)), True))
