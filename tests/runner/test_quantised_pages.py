"""Models on quantised pages: batches, chunks and preemption change no token, and memory is what the pages take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from driven import assert_same, prompts, run, run_alone, submit
from plain_kernels import PlainKernels
from tiny_models import config_of

from vllm_mlx.core.cachespec import LayerSpec, Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.step import Runner
from vllm_mlx.runner.kernel_choice import quantise_pages
from vllm_mlx.runner.layers import LayerShape, ModelLayers

Open = Callable[..., Runner]
DTYPES = ("int8", "int4")
PLACES = pytest.mark.parametrize("kernels", [None, PlainKernels()], ids=["gathered", "kernels"])
TOLERANCE = 1e-3
"""Of log-probabilities: attention adds up in another order, and the elements it writes may fall on the next step."""


def submits_of(**sampling: object) -> list:
    return [submit(str(i), p, max_tokens=14 + i, **sampling) for i, p in enumerate(prompts(5, 23, 12, 70, 33))]


@PLACES
@pytest.mark.parametrize(("name", "dtype"), [("llama", "int8"), ("gemma3_text", "int4"), ("gpt_oss", "int8")])
def test_a_changing_batch_gives_the_tokens_of_each_alone(
    name: str, dtype: str, kernels: Any, open_runner: Open
) -> None:
    runner = open_runner(name, kernels=kernels, kv_cache_dtype=dtype, max_num_seqs=8)
    alone = run_alone(runner, submits_of(logprobs=None), config=Config(max_num_seqs=8))
    assert_same(run(runner, submits_of(logprobs=None), config=Config(max_num_seqs=8), every=2), alone)


@PLACES
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_a_prompt_see_themselves_as_later_ones_do(dtype: str, kernels: Any, open_runner: Open) -> None:
    runner = open_runner("llama", kernels=kernels, kv_cache_dtype=dtype)
    submits = [submit(str(i), p, max_tokens=1) for i, p in enumerate(prompts(150, 97))]
    config = Config(prefix_cache=False)
    whole = run_alone(runner, submits, config=config)
    for size in (16, 61):
        chunked = run_alone(runner, submits, config=Config(prefix_cache=False, prefill_step_size=size))
        assert_same(chunked, whole, tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_and_gathering_agree(dtype: str, open_runner: Open) -> None:
    submits = [submit(str(i), p, max_tokens=2) for i, p in enumerate(prompts(70, 33))]
    gathered, read = (
        run(open_runner("llama", kernels=kernels, kv_cache_dtype=dtype), submits, config=Config())
        for kernels in (None, PlainKernels())
    )
    assert_same(read, gathered, tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_preemption_changes_no_token(dtype: str, open_runner: Open) -> None:
    submits = [submit(str(i), prompt, max_tokens=50, logprobs=None) for i, prompt in enumerate(prompts(30, 40, 50, 33))]
    alone = run_alone(open_runner("llama", kv_cache_dtype=dtype), submits, config=Config())
    tight = open_runner("llama", kv_cache_dtype=dtype, num_pages=8)
    assert_same(run(tight, submits, config=Config(prefill_step_size=32)), alone)


@PLACES
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_pages_are_near_full_precision(dtype: str, kernels: Any, open_runner: Open) -> None:
    submits = [submit(str(i), p, max_tokens=1, logprobs=3) for i, p in enumerate(prompts(70, 33))]
    exact = run(open_runner("llama"), submits, config=Config())
    near = run(open_runner("llama", kernels=kernels, kv_cache_dtype=dtype), submits, config=Config())
    for name, answer in exact.items():
        one, other = near[name].logprobs[0], answer.logprobs[0]
        assert one is not None
        assert other is not None
        assert 0 < abs(one.logprob - other.logprob) < {"int8": 0.05, "int4": 0.5}[dtype]


@PLACES
def test_pages_take_the_memory_that_is_told(kernels: Any, open_runner: Open) -> None:
    told = {}
    for dtype in ("auto", *DTYPES):
        runner = open_runner("llama", kernels=kernels, kv_cache_dtype=dtype, num_pages=64)
        told[dtype] = runner.info.cache.page_bytes
        assert runner.memory().pages == 64 * told[dtype]
    assert told["auto"] > 3 * told["int8"] > 3 * told["int4"]  # full precision is float32 here


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_memory_holds_more_pages(dtype: str, open_runner: Open) -> None:
    def num_pages(**settings: Any) -> int:
        return open_runner("llama", num_pages=None, cache_memory_mb=1, max_num_seqs=2000, **settings).info.num_pages

    assert num_pages(kv_cache_dtype=dtype) > 3 * num_pages()


@PLACES
@pytest.mark.parametrize("dtype", DTYPES)
def test_copied_pages_hold_the_same_bits(dtype: str, kernels: Any, open_runner: Open) -> None:
    runner = open_runner("llama", kernels=kernels, kv_cache_dtype=dtype)
    run(runner, submits_of(logprobs=None), config=Config(prefix_cache=False))
    pages = runner._pages  # type: ignore[attr-defined]
    pages.copy([(1, 40), (2, 41)])
    pools = pages.pools if kernels is not None else pages._pools
    heads = config_of("llama")["num_key_value_heads"]
    for array in [array for pool in pools for array in pool.arrays]:
        by_page = array.reshape(heads, 64, -1)
        assert mx.array_equal(by_page[:, 40:42], by_page[:, 1:3])
        assert mx.any(by_page[:, 1] != 0)


def test_a_kernel_that_fails_its_check_sends_layers_to_rows_unquantised(open_runner: Open) -> None:
    expected = run(open_runner("llama"), submits_of(), config=Config())
    runner = open_runner("llama", kernels=PlainKernels(broken=True), kv_cache_dtype="int4")
    assert {layer.layout for layer in runner.info.cache.layers} == {Layout.ROWS}
    assert runner.info.cache.page_bytes == 0
    assert_same(run(runner, submits_of(), config=Config(), every=2), expected)


@pytest.mark.parametrize("name", ["mamba2", "gemma2"])
def test_a_model_without_pages_refuses_quantised_ones(name: str, open_runner: Open) -> None:
    with pytest.raises(ModelError, match=r"--kv-cache-dtype int8: no layer of this model.*leave the flag out"):
        open_runner(name, kv_cache_dtype="int8")


def test_a_model_with_some_layers_in_pages_says_how_many(open_runner: Open) -> None:
    runner = open_runner("qwen3_next", kv_cache_dtype="int8")
    assert any(note.startswith("KV cache in int8: ") for note in runner.info.notes)


def test_layers_whose_heads_do_not_divide_keep_their_type() -> None:
    whole = LayerShape(LayerSpec(Layout.PAGES), 2, 64, 64, mx.bfloat16)
    odd = LayerShape(LayerSpec(Layout.PAGES), 2, 36, 36, mx.bfloat16)
    layers, notes = quantise_pages(ModelLayers((whole, odd), (0, 0), 10), "int4")
    assert [shape.bits for shape in layers.shapes] == [4, None]
    assert notes == ["KV cache in int4: 1 of 2 layers"]
    with pytest.raises(ModelError, match="no layer"):
        quantise_pages(ModelLayers((odd,), (0,), 10), "int4")
