"""Every architecture gives the same tokens alone, in a batch that others join and leave, and in the library itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from driven import assert_same, prompts, run, run_alone, submit
from tiny_models import ARCHITECTURES

from vllm_mlx import families
from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.step import Runner

LENGTHS = (5, 23, 12, 17, 70, 9)
OutOfPages = {"gemma2", "gemma4_text", "deepseek_v3"}
"""Families whose attention does not pass through the library's entry point, or is shared: all rows."""
Unbatched = {"gemma3n", "gpt_bigcode", "llama4"}


def submits_of(max_tokens: int = 12) -> list:
    return [submit(str(i), prompt, max_tokens=max_tokens + i) for i, prompt in enumerate(prompts(*LENGTHS))]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_equals_each_sequence_alone(name: str, open_runner: Callable[..., Runner]) -> None:
    runner = open_runner(name)
    submits = submits_of()
    alone = run_alone(runner, submits, config=Config())
    assert_same(run(runner, submits, config=Config(prefill_step_size=8), every=2), alone)
    assert_same(run(runner, submits, config=Config(prefill_step_size=512), every=3), alone)
    assert_same(run(runner, submits, config=Config(), overlap=False), alone)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_equal_the_library_s_own(
    name: str, open_runner: Callable[..., Runner], tiny_model: Callable[[str], Path]
) -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    runner = open_runner(name)
    submits = submits_of(max_tokens=8)[:4]
    ours = run(runner, submits, config=Config(), every=1)
    model, _ = load_model(tiny_model(name))
    for one in submits:
        steps = generate_step(mx.array(one.prompt.token_ids), model, max_tokens=one.sampling.max_tokens)
        expected = [(int(token), logprobs[int(token)].item()) for token, logprobs in steps]
        answer = ours[one.request_id]
        assert answer.token_ids == tuple(token for token, _ in expected)
        for found, (_, logprob) in zip(answer.logprobs, expected, strict=True):
            assert found is not None
            assert abs(found.logprob - logprob) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_passes_through_the_pages(name: str, open_runner: Callable[..., Runner]) -> None:
    layouts = {layer.layout for layer in open_runner(name).info.cache.layers}
    if name in Unbatched:
        assert layouts == {Layout.OWN}
    elif name in OutOfPages:
        assert layouts == {Layout.ROWS}
    else:
        assert layouts <= {Layout.PAGES, Layout.STATE}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma2", "qwen3_next", "gpt_oss"])
def test_preemption_changes_no_token(name: str, open_runner: Callable[..., Runner]) -> None:
    submits = [submit(str(i), prompt, max_tokens=50) for i, prompt in enumerate(prompts(30, 40, 50, 33))]
    roomy = open_runner(name)
    alone = run_alone(roomy, submits, config=Config())
    tight = open_runner(name, num_pages=8)
    assert_same(run(tight, submits, config=Config(prefill_step_size=32)), alone)


def test_every_family_record_is_found_by_its_model_types() -> None:
    found = families.all_families()
    assert found
    for model_type, family in found.items():
        assert families.find(model_type) is family
    assert families.find("nothing-like-it").name == "default"
