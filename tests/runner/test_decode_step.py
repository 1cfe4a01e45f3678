"""What surrounds the kernels on a GPU, with the kernels themselves replaced by plain operations."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from driven import assert_same, prompts, run, run_alone, submit
from plain_kernels import PlainKernels
from tiny_models import ARCHITECTURES

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.step import DecodeRow, Runner
from vllm_mlx.runner import device
from vllm_mlx.runner.decode_inputs import DecodeInputs
from vllm_mlx.runner.decode_step import row_sizes

Open = Callable[..., Runner]

pytestmark = pytest.mark.skipif(device.probe().is_gpu, reason="a GPU has kernels of its own, and compiles its steps")
LENGTHS = (5, 23, 12, 70, 33)


def submits_of(**sampling: object) -> list:
    return [submit(str(i), p, max_tokens=14 + i, seed=i, **sampling) for i, p in enumerate(prompts(*LENGTHS))]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kernel_pages_give_the_tokens_of_gathered_pages(name: str, open_runner: Open) -> None:
    submits = submits_of()
    gathering = open_runner(name)
    expected = run(gathering, submits, config=Config())
    runner = open_runner(name, kernels=PlainKernels(), max_num_seqs=8)
    assert runner.info.cache.layers == gathering.info.cache.layers
    assert_same(run(runner, submits, config=Config(prefill_step_size=16, max_num_seqs=8), every=2), expected)
    assert_same(run_alone(runner, submits, config=Config(max_num_seqs=8)), expected)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.7, "min_p": 0.05},
        {"temperature": 0.9, "top_k": 100},
        {"temperature": 0.7, "repetition_penalty": 1.3},
        {"temperature": 0.7, "min_tokens": 6, "stop_token_ids": (7, 9)},
        {"temperature": 0.7, "logit_bias": {5: 4.0}},
    ],
)
def test_steps_that_sample_choose_what_the_eager_sampler_chooses(sampling: dict, open_runner: Open) -> None:
    submits = submits_of(logprobs=None, **sampling)
    expected = run(open_runner("llama"), submits, config=Config())
    for eager in (False, True):
        runner = open_runner("llama", kernels=PlainKernels(), max_num_seqs=8, enforce_eager=eager)
        assert_same(run(runner, submits, config=Config(max_num_seqs=8), every=2), expected)


def test_a_greedy_row_beside_drawing_ones_keeps_its_tokens(open_runner: Open) -> None:
    greedy, *drawing = submits_of(logprobs=None)
    drawing = [submit(s.request_id, s.prompt.token_ids, temperature=1.0, logprobs=None) for s in drawing]
    runner = open_runner("llama", kernels=PlainKernels())
    alone = run_alone(runner, [greedy], config=Config())
    together = run(runner, [greedy, *drawing], config=Config())
    assert together[greedy.request_id] == alone[greedy.request_id]


def test_a_model_that_attends_in_another_type_than_its_cache_is_served(open_runner: Open) -> None:
    """Cohere 2 hands float32 queries to its attention where keys are float16."""
    submits = submits_of()
    expected = run(open_runner("cohere2", dtype="float16"), submits, config=Config())
    runner = open_runner("cohere2", dtype="float16", kernels=PlainKernels())
    assert_same(run(runner, submits, config=Config()), expected, tolerance=1e-2)


def test_preemption_changes_no_token(open_runner: Open) -> None:
    submits = [submit(str(i), prompt, max_tokens=50, logprobs=None) for i, prompt in enumerate(prompts(30, 40, 50, 33))]
    alone = run_alone(open_runner("llama"), submits, config=Config())
    tight = open_runner("llama", kernels=PlainKernels(), num_pages=8)
    assert_same(run(tight, submits, config=Config(prefill_step_size=32)), alone)


def test_a_kernel_that_fails_its_check_sends_layers_to_rows(
    open_runner: Open, caplog: pytest.LogCaptureFixture
) -> None:
    submits = submits_of()
    expected = run(open_runner("llama"), submits, config=Config())
    runner = open_runner("llama", kernels=PlainKernels(broken=True))
    assert {layer.layout for layer in runner.info.cache.layers} == {Layout.ROWS}
    assert [status.problem for status in runner.info.kernels] == ["made to fail"]
    assert sum("made to fail" in record.getMessage() for record in caplog.records) == 1
    assert_same(run(runner, submits, config=Config(), every=2), expected)


def test_all_shapes_are_warmed_in_the_end_and_change_nothing(open_runner: Open) -> None:
    runner = open_runner("llama", kernels=PlainKernels(), max_num_seqs=100)
    submits = submits_of(logprobs=None, temperature=0.8)
    config = Config(max_num_seqs=100)
    before = run(runner, submits, config=config)
    calls = 0
    while runner.idle():
        calls += 1
    assert calls > 0
    assert not runner.idle()
    assert_same(run(runner, submits, config=config), before)


def test_copied_pages_hold_the_same(open_runner: Open) -> None:
    runner = open_runner("llama", kernels=PlainKernels())
    run(runner, submits_of(), config=Config())
    pages = runner._pages  # type: ignore[attr-defined]
    pages.copy([(1, 40), (2, 41)])
    for pool in pages.pools:
        for array in (pool.keys, pool.values):
            by_page = array.reshape(-1, 64, 32, array.shape[-1])
            assert mx.array_equal(by_page[:, 40:42], by_page[:, 1:3])
            assert mx.any(by_page[:, 1] != 0)


def test_row_sizes_are_few_and_hold_all_rows() -> None:
    assert row_sizes(1) == (1,)
    assert row_sizes(3) == (1, 2, 4)
    assert row_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert row_sizes(65)[-1] == 96
    assert row_sizes(256)[-2:] == (224, 256)


def test_tables_on_the_device_follow_the_rows() -> None:
    inputs = DecodeInputs(windows=(None,), kv_heads=2, num_slots=3, max_pages=4)
    first = (DecodeRow(0, 5, (7,)), DecodeRow(2, 40, (3, 9)))
    inputs.packed(first, num_rows=4)
    assert inputs.tables[0].tolist() == [[7, 0, 0, 0], [0, 0, 0, 0], [3, 9, 0, 0], [0, 0, 0, 0]]
    inputs.packed((DecodeRow(0, 32, (7, 1)), DecodeRow(2, 3, (5,))), num_rows=2)
    assert inputs.tables[0][0, :2].tolist() == [7, 1]
    assert inputs.tables[0][2, :1].tolist() == [5]


def test_pages_that_a_window_left_behind_are_not_sent_again() -> None:
    inputs = DecodeInputs(windows=(None, 33), group_windows=(None, 33), kv_heads=2, num_slots=1, max_pages=4)
    inputs.packed((DecodeRow(0, 63, (1, 2), ((5, 6),)),), num_rows=1)
    assert [table[0].tolist() for table in inputs.tables] == [[1, 2, 0, 0], [5, 6, 0, 0]]
    arrays = inputs.host_arrays((DecodeRow(0, 96, (1, 2, 3, 4), ((0, 0, 7, 8),)),), num_rows=1)
    inputs.packed((DecodeRow(0, 96, (1, 2, 3, 4), ((0, 0, 7, 8),)),), num_rows=1)
    assert [table[0].tolist() for table in inputs.tables] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (arrays["writes_0"].tolist(), arrays["writes_1"].tolist()) == ([4 * 32], [8 * 32])
    assert arrays["items_1"][0].tolist() == [0, 64, 97, 96]  # what is read begins with the window
    other = DecodeRow(0, 70, (9, 8, 7), ((0, 3, 4),))
    inputs.packed((other,), num_rows=1)
    assert inputs.tables[1][0, 1:3].tolist() == [3, 4]


def test_padded_rows_write_to_the_scratch_page_and_have_no_items() -> None:
    inputs = DecodeInputs(windows=(None, 8), kv_heads=2, num_slots=3, max_pages=4)
    arrays = inputs.host_arrays((DecodeRow(1, 33, (4, 6)),), num_rows=4)
    assert arrays["writes_0"].tolist() == [6 * 32 + 1, 0, 0, 0]
    assert arrays["slots"].tolist() == [1, 3, 3, 3]
    assert arrays["positions"].tolist() == [33, 0, 0, 0]
    for i in (0, 1):
        assert arrays[f"starts_{i}"].tolist() == [0, 1, 1, 1, 1]
        assert (arrays[f"items_{i}"][1:, 0] == -1).all()
    assert arrays["items_1"][0].tolist() == [0, 0, 34, 33]
