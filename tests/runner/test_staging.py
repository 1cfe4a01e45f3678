"""Numbers that are sent through memory which is used again and again."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from driven import assert_same, prompts, run, submit
from plain_kernels import PlainKernels

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import Runner
from vllm_mlx.runner import device
from vllm_mlx.runner.staging import MIN_SIZE, Staging

Open = Callable[..., Runner]


def numbers(start: int, *shape: int) -> np.ndarray:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.int32).reshape(shape)


@pytest.mark.parametrize("shape", [(1,), (MIN_SIZE,), (MIN_SIZE + 1,), (3, 7), (2, 5, MIN_SIZE)])
def test_an_array_has_the_numbers_and_the_shape_of_what_was_sent(shape: tuple[int, ...]) -> None:
    staging = Staging()
    staging.begin()
    sent = staging.send(numbers(5, *shape))
    assert (sent.shape, sent.dtype) == (shape, mx.int32)
    assert (np.array(sent) == numbers(5, *shape)).all()


def test_numbers_stay_until_the_step_behind_theirs_is_done() -> None:
    staging = Staging()
    sent: list[list[mx.array]] = []
    for step in range(6):
        staging.begin()
        sent.append([staging.send(numbers(100 * step + 10 * i, 2, 3)) for i in range(3)])
        for number in range(max(0, step - 2), step + 1):  # that step, the one in flight, and the one done last
            assert [part[0, 0].item() for part in sent[number]] == [100 * number + 10 * i for i in range(3)]
        if step:  # one step runs while the next is built
            staging.done()
    assert sent[0][0][0, 0].item() >= 300, "memory is used again"


def test_what_is_sent_at_rest_stays_until_a_step_is_done() -> None:
    staging = Staging()
    sent = staging.send(numbers(1, 4))
    staging.begin()
    staging.send(numbers(50, 4))
    assert sent.tolist() == [1, 2, 3, 4]


@pytest.mark.skipif(device.probe().is_gpu, reason="these are the kernels of machines without one")
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2], ids=["compiled sampler", "eager sampler"])
def test_no_step_reads_what_was_given_free(
    name: str, eager: bool, logprobs: int | None, open_runner: Open, overwrite_free: Callable[[], None]
) -> None:
    begins, asked = prompts(70)[0], {"logprobs": logprobs}
    submits = [submit(str(i), p, max_tokens=9 + i, seed=i, **asked) for i, p in enumerate(prompts(5, 23, 70, 150))]
    submits += [submit(f"like {i}", [*begins, 7 + i, 9], max_tokens=9, temperature=0.8, **asked) for i in range(3)]
    expected = run(open_runner(name), submits, config=Config())
    overwrite_free()
    kernels = PlainKernels(plans=True)
    runner = open_runner(name, kernels=kernels, max_num_seqs=8, prefill_step_size=64, enforce_eager=eager)
    assert_same(run(runner, submits, config=Config(max_num_seqs=8, prefill_step_size=64), every=2), expected)
