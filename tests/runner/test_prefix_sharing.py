"""Real models give the same tokens whether a prefix was computed or found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from driven import prompts, submit
from plain_kernels import PlainKernels

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Submit
from vllm_mlx.core.step import Runner
from vllm_mlx.engine.scheduler import Scheduler

LONG, END = prompts(150, 20, seed=3)


def serve(
    runner: Runner, turns: list[list[Submit]], **settings: Any
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Run the turns one after the other with one scheduler; tokens by name, and what each sequence found cached."""
    scheduler = Scheduler(runner.info, Config(prefill_step_size=64, **settings))
    tokens: dict[str, tuple[int, ...]] = {}
    cached: dict[str, int] = {}
    for turn in turns:
        for one in turn:
            scheduler.submit(one)
        in_flight = None
        while scheduler.has_work or in_flight is not None:
            step = scheduler.plan()
            launched = runner.launch(step) if step is not None else None
            if in_flight is not None:
                scheduler.commit(runner.collect(in_flight))
            in_flight = launched
            scheduler.check()
            for output in scheduler.take_outputs():
                tokens[output.request_id] = tokens.get(output.request_id, ()) + output.token_ids
                cached[output.request_id] = max(cached.get(output.request_id, 0), output.num_cached)
    return tokens, cached


def conversation() -> list[list[Submit]]:
    first = submit("first", LONG, max_tokens=24, logprobs=None)
    again = submit("again", LONG, max_tokens=24, logprobs=None)
    others = [submit(f"branch {i}", [*LONG[:120], *END[i:]], max_tokens=16, logprobs=None) for i in range(3)]
    return [[first], [again, *others], [submit("longer", [*LONG, *END], max_tokens=16, logprobs=None)]]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("kernels", [None, PlainKernels()], ids=["gathered", "kernels"])
def test_found_prefixes_change_no_token(name: str, kernels: Any, open_runner: Callable[..., Runner]) -> None:
    check_that_found_prefixes_change_nothing(lambda: open_runner(name, kernels=kernels))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("kernels", [None, PlainKernels()], ids=["gathered", "kernels"])
def test_found_prefixes_of_quantised_pages_change_no_token(
    name: str, dtype: str, kernels: Any, open_runner: Callable[..., Runner]
) -> None:
    check_that_found_prefixes_change_nothing(lambda: open_runner(name, kernels=kernels, kv_cache_dtype=dtype))


def check_that_found_prefixes_change_nothing(open_runner: Callable[[], Runner]) -> None:
    expected, none = serve(open_runner(), conversation(), prefix_cache=False)
    found, cached = serve(open_runner(), conversation())
    assert found == expected
    assert set(none.values()) == {0}
    assert cached == {"first": 0, "again": 149, "branch 0": 96, "branch 1": 96, "branch 2": 96, "longer": 150}


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "mamba2", "rwkv7", "gemma2", "deepseek_v3", "llama4"])
def test_found_checkpoints_change_no_token(name: str, open_runner: Callable[..., Runner]) -> None:
    runner = open_runner(name)
    expected, _ = serve(runner, conversation(), prefix_cache=False)
    found, cached = serve(runner, conversation())
    assert found == expected
    assert cached["again"] == cached["longer"] == 128
