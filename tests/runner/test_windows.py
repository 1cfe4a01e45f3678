"""Models with sliding windows give the same tokens when the pages that were left behind are others' by now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from driven import Answer, assert_same, prompts, submit
from plain_kernels import PlainKernels
from tiny_models import write_tiny_model

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Submit
from vllm_mlx.core.step import Runner
from vllm_mlx.engine.scheduler import Scheduler
from vllm_mlx.runner.load import create_runner_factory

THREE_GROUPS = {"num_hidden_layers": 6, "sliding_window_pattern": 3}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": {**THREE_GROUPS, "sliding_window": 40},
    "cohere2": {**THREE_GROUPS, "sliding_window": 8},
    "gpt_oss": {"sliding_window": 33},
}
LONG = prompts(100, 130, 70, seed=5)
SLOW = pytest.mark.slow
PLACES = [
    pytest.param("gemma3_text", None, "auto", id="gemma3-gathered"),
    pytest.param("gpt_oss", None, "auto", id="gpt_oss-gathered"),
    pytest.param("cohere2", None, "auto", id="cohere2-gathered", marks=SLOW),
    pytest.param("gemma3_text", PlainKernels(), "auto", id="gemma3-kernels"),
    pytest.param("cohere2", PlainKernels(), "auto", id="cohere2-kernels", marks=SLOW),
    pytest.param("gpt_oss", PlainKernels(), "auto", id="gpt_oss-kernels", marks=SLOW),
    pytest.param("gemma3_text", None, "int8", id="gemma3-gathered-int8", marks=SLOW),
    pytest.param("gemma3_text", PlainKernels(), "int8", id="gemma3-kernels-int8", marks=SLOW),
]


def open_at(path: Path, *, kernels: Any = None, **settings: Any) -> Runner:
    config = Config(model=str(path), **{"num_pages": 100, "max_num_seqs": 3, **settings})
    return create_runner_factory(path, config, kernels=kernels)(lambda *_: None)


def serve(runner: Runner, submits: list[Submit], **settings: Any) -> tuple[dict[str, Answer], int]:
    """Answers, and the most pages that were in use."""
    scheduler = Scheduler(runner.info, Config(prefill_step_size=64, max_num_seqs=3, **settings))
    for one in submits:
        scheduler.submit(one)
    tokens: dict[str, list[int]] = {one.request_id: [] for one in submits}
    most, in_flight = 0, None
    while scheduler.has_work or in_flight is not None:
        step = scheduler.plan()
        launched = runner.launch(step) if step is not None else None
        if in_flight is not None:
            scheduler.commit(runner.collect(in_flight))
        in_flight = launched
        scheduler.check()
        most = max(most, scheduler.stats().pages_used)
        for output in scheduler.take_outputs():
            tokens[output.request_id] += output.token_ids
    return {name: Answer(tuple(found), ()) for name, found in tokens.items()}, most


@pytest.mark.parametrize(("name", "kernels", "dtype"), PLACES)
def test_pages_left_behind_are_given_to_others_and_change_no_token(
    name: str, kernels: Any, dtype: str, tmp_path: Path
) -> None:
    windowed = write_tiny_model(name, tmp_path / name, changes=MODELS[name])
    submits = [submit(str(i), prompt, max_tokens=20 + 20 * i, logprobs=None) for i, prompt in enumerate(LONG)]
    roomy = open_at(windowed, kv_cache_dtype=dtype)
    alone = {name: answer for one in submits for name, answer in serve(roomy, [one], prefix_cache=False)[0].items()}
    groups = roomy.info.cache.page_groups
    at_once = sum(groups.pages_for(len(one.prompt) + (one.sampling.max_tokens or 0)) for one in submits)
    whole = sum(-(-(len(one.prompt) + (one.sampling.max_tokens or 0)) // 32) for one in submits) * len(groups.windows)
    assert at_once < whole
    tight = open_at(windowed, kernels=kernels, kv_cache_dtype=dtype, num_pages=at_once + 5)
    found, most = serve(tight, submits)
    assert_same(found, alone)
    assert most <= at_once
    assert_same(serve(tight, submits)[0], alone)  # from what is left of them
    tight.close()
    roomy.close()
