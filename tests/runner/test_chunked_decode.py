"""Several rows of a sequence in one step compute what they would one after the other, however its pages are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from driven import prompts, submit
from forcing import Loop
from plain_kernels import PlainKernels
from tiny_models import write_tiny_model

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Submit
from vllm_mlx.core.step import Runner
from vllm_mlx.runner import device
from vllm_mlx.runner.load import create_runner_factory

Open = Callable[..., Runner]

END, WIDTH = 2, 12
SCRIPT = " ".join(["?", *map(str, range(40, 52)), "?", *map(str, range(60, 64)), "? ?"])
"""Twelve tokens without a choice cross a page boundary behind prompts of 23 tokens."""
CONFIG = Config(max_num_seqs=16, prefix_cache=False)
SLOW = pytest.mark.slow
PLAIN = pytest.mark.skipif(device.probe().is_gpu, reason="a GPU has kernels of its own")
WINDOWS = {"num_hidden_layers": 6, "sliding_window_pattern": 3, "sliding_window": 8}


PLACES = [
    pytest.param("llama", {}, {}, id="llama"),
    pytest.param("llama", {"kernels": PlainKernels()}, {}, id="llama-kernels", marks=PLAIN),
    pytest.param("llama", {"kv_cache_dtype": "int8"}, {}, id="llama-int8"),
    pytest.param(
        "llama", {"kv_cache_dtype": "int4", "kernels": PlainKernels()}, {}, id="llama-kernels-int4", marks=PLAIN
    ),
    pytest.param("gemma3_text", {}, WINDOWS, id="gemma3_text-windows"),
    pytest.param(
        "gemma3_text", {"kernels": PlainKernels()}, WINDOWS, id="gemma3_text-windows-kernels", marks=[PLAIN, SLOW]
    ),
    pytest.param("gpt_oss", {"kv_cache_dtype": "int8"}, {"sliding_window": 33}, id="gpt_oss-int8", marks=SLOW),
    pytest.param("qwen3_moe", {}, {}, id="qwen3_moe", marks=SLOW),
]


def submits_of(**sampling: Any) -> list[Submit]:
    """Constrained, free, constrained; of 5 to 70 tokens."""
    given = {"logprobs": None, "max_tokens": 19, "stop_token_ids": (END,), **sampling}
    made = [submit(f"s{i}", p, **{"seed": i, **given}) for i, p in enumerate(prompts(23, 5, 70))]
    grammars = (SCRIPT, None, " ".join(SCRIPT.split()[3:]))
    return [
        msgspec.structs.replace(one, sampling=one.sampling.replace(grammar=grammar))
        for one, grammar in zip(made, grammars, strict=True)
    ]


def assert_chunks_change_nothing(runner: Runner, *, config: Config = CONFIG, **sampling: Any) -> None:
    one_by_one, chunked = (Loop(runner, config, end=END, chunked=chunked) for chunked in (False, True))
    expected = one_by_one.run(*submits_of(**sampling))
    assert expected["s0"][1 : 1 + WIDTH] == tuple(range(40, 40 + WIDTH))
    assert chunked.run(*submits_of(**sampling)) == expected
    assert max(one_by_one.num_rows) <= 3
    assert max(chunked.num_rows) > WIDTH


@pytest.mark.parametrize(("name", "settings", "changes"), PLACES)
def test_rows_side_by_side_change_no_token(name: str, settings: Any, changes: Any, tmp_path: Path) -> None:
    path = write_tiny_model(name, tmp_path / name, changes=changes)
    kernels = settings.get("kernels")
    given = {key: value for key, value in settings.items() if key != "kernels"}
    config = Config(model=str(path), num_pages=100, max_num_seqs=16, **given)
    runner = create_runner_factory(path, config, kernels=kernels)(lambda *_: None)
    assert runner.info.chunked_decode
    assert_chunks_change_nothing(runner)
    runner.close()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.7},
        {"temperature": 0.8, "top_k": 5, "frequency_penalty": 1.0, "logit_bias": {45: 3.0}},
    ],
    ids=["drawn", "penalties", "both"],
)
def test_forced_tokens_count_for_the_sampler_as_if_sampled(sampling: Any, open_runner: Open) -> None:
    assert_chunks_change_nothing(open_runner("llama", max_num_seqs=16), **sampling)


def test_few_rows_to_spare_change_no_token(open_runner: Open) -> None:
    runner, config = open_runner("llama", max_num_seqs=5), Config(max_num_seqs=5, prefix_cache=False)
    loops = [Loop(runner, config, end=END, chunked=chunked) for chunked in (False, True)]
    one, other = (loop.run(*submits_of()) for loop in loops)
    assert one == other
    assert max(loops[1].num_rows) == 5


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "deepseek_v3", "gemma3n"])
def test_models_with_state_outside_pages_decode_token_by_token(name: str, open_runner: Open) -> None:
    assert not open_runner(name).info.chunked_decode
