"""Pools are written in place and grow only as pages are used; what is freed goes back to the system at rest."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import mlx.core as mx
import pytest
from driven import assert_same, prompts, run, run_alone, submit
from plain_kernels import PlainKernels
from served import resident_kib
from stepped import payloads_of

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import Runner, Step
from vllm_mlx.engine.scheduler import Scheduler


@pytest.mark.parametrize(("name", "num_arrays"), [("llama", 4), ("gemma3_text", 2)], ids=["one-group", "two-groups"])
def test_a_decode_step_copies_no_pool(name: str, num_arrays: int, open_runner: Callable[..., Runner]) -> None:
    runner = open_runner(name, num_pages=20_000)
    submits = [submit(str(i), prompt, max_tokens=4) for i, prompt in enumerate(prompts(20, 30))]
    runner._pages.ensure(19_999)  # type: ignore[attr-defined]
    run(runner, submits, config=Config())
    pool_bytes = runner.memory().pages / num_arrays  # keys and values of two layers, or of two that share a pool
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    run(runner, submits, config=Config())
    assert mx.get_peak_memory() - before < pool_bytes / 2


def test_moving_pages_copies_no_pool(open_runner: Callable[..., Runner]) -> None:
    runner = open_runner("llama", num_pages=20_000)
    run(runner, [submit("a", prompts(70)[0], max_tokens=1)], config=Config())
    (payload,) = payloads_of(runner.collect(runner.launch(Step(1, exports=(1,)))))
    runner._pages.ensure(19_999)  # type: ignore[attr-defined]
    pool_bytes = runner.memory().pages / 4  # two layers, keys and values
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for number in range(2, 6):
        step = Step(number, exports=(1, 2), imports=((9_000 + number, payload),), copies=((1, 10_000 + number),))
        runner.collect(runner.launch(step))
    assert mx.get_peak_memory() - before < pool_bytes / 2


def test_pools_grow_with_use_and_keep_their_contents(open_runner: Callable[..., Runner]) -> None:
    runner = open_runner("llama", num_pages=2_000)
    if runner.info.backend != "cpu":
        pytest.skip("a GPU's pools are allocated whole")
    small = runner.memory().pages
    submits = [submit(str(i), prompt) for i, prompt in enumerate(prompts(*[400] * 8))]
    alone = run_alone(runner, submits[:2], config=Config())
    assert runner.memory().pages == small
    together = run(runner, submits, config=Config(), every=1)
    assert runner.memory().pages > small
    assert_same({name: together[name] for name in alone}, alone)


@pytest.mark.parametrize("kernels", [None, PlainKernels()], ids=["gathered", "kernels"])
def test_memory_is_given_back_on_close(open_runner: Callable[..., Runner], kernels: PlainKernels | None) -> None:
    before = mx.get_active_memory()
    runner = open_runner("llama", kernels=kernels)
    assert mx.get_active_memory() > before
    held = mx.get_active_memory() - before
    runner.close()
    mx.synchronize()
    assert mx.get_active_memory() - before < held / 10


def test_a_step_that_was_not_collected_holds_no_memory_after_close(open_runner: Callable[..., Runner]) -> None:
    before = mx.get_active_memory()
    runner = open_runner("llama")
    scheduler = Scheduler(runner.info, Config())
    scheduler.submit(submit("a", prompts(40)[0]))
    step = scheduler.plan()
    assert step is not None
    runner.launch(step)
    runner.close()
    assert mx.get_active_memory() <= before + (1 << 16)


def test_requests_of_one_token_leave_no_memory_behind(open_runner: Callable[..., Runner]) -> None:
    runner = open_runner("llama")
    submits = [submit(str(i), prompt, max_tokens=1, logprobs=None) for i, prompt in enumerate(prompts(*[4] * 50))]
    config = Config(max_num_seqs=1)
    run(runner, submits, config=config)
    mx.synchronize()
    before = mx.get_active_memory()
    run(runner, submits, config=config)
    mx.synchronize()
    rounding = 0 if runner.info.backend == "cpu" else 1 << 16
    assert mx.get_active_memory() <= before + rounding


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library cannot be asked")
def test_at_rest_freed_arrays_go_back_to_the_system_though_others_stay(open_runner: Callable[..., Runner]) -> None:
    runner = open_runner("llama")
    if runner.info.backend != "cpu":
        pytest.skip("a GPU's arrays are not the C library's")
    arrays = [mx.full((32, 256), number) for number in range(2_000)]
    mx.eval(arrays)
    num_kib = sum(array.nbytes for array in arrays) // 1024
    before = resident_kib(os.getpid())
    kept = arrays[::100]
    del arrays
    assert not runner.idle()
    assert before - resident_kib(os.getpid()) > num_kib * 0.8
    assert [array[0, 0].item() for array in kept] == list(range(0, 2_000, 100))
