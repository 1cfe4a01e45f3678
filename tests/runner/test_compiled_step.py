"""The decode step as a compiled function: traced once, then replayed with other tokens, tables and neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import msgspec
import pytest
from driven import assert_same, prompts, run, submit
from forcing import Loop
from pure_kernels import PureKernels, Replay

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import Runner
from vllm_mlx.runner import decode_step, device

Open = Callable[..., Runner]

pytestmark = pytest.mark.skipif(device.probe().is_gpu, reason="a GPU has kernels of its own, and compiles its steps")


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Replay:
    made = Replay(tmp_path)
    # Only the step's own: the library's modules may be imported meanwhile and would keep it.
    monkeypatch.setattr(decode_step, "mx", SimpleNamespace(**{**vars(mx), "compile": made}))
    return made


def submits_of(**sampling: object) -> list:
    made = prompts(5, 23, 12, 70, 33, 3)
    return [
        submit(str(i), p, **{"max_tokens": 14 + i, "seed": i, "logprobs": None, **sampling}) for i, p in enumerate(made)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_replayed_steps_give_the_tokens_of_eager_ones(name: str, open_runner: Open, replay: Replay) -> None:
    eager, runner = open_runner(name), open_runner(name, kernels=PureKernels(), max_num_seqs=3, max_model_len=128)
    num_traces = replay.num_traces
    assert num_traces >= 2 * len((1, 2, 4))
    for sampling in ({}, {"temperature": 0.9}):
        expected = run(eager, submits_of(**sampling), config=Config())
        for every in (0, 2):
            found = run(
                runner, submits_of(**sampling), config=Config(max_num_seqs=3, prefill_step_size=16), every=every
            )
            assert_same(found, expected)
    assert replay.num_traces == num_traces, "a step was traced again"
    assert replay.num_replays > 10 * num_traces
    expected = run(eager, submits_of(logprobs=2, top_k=3, temperature=0.9), config=Config())
    found = run(runner, submits_of(logprobs=2, top_k=3, temperature=0.9), config=Config(max_num_seqs=3))
    assert_same(found, expected)


def test_replayed_steps_take_known_tokens(open_runner: Open, replay: Replay) -> None:
    def loops(runner: Runner) -> list[Loop]:
        return [Loop(runner, Config(max_num_seqs=8), end=2, chunked=chunked) for chunked in (False, True)]

    constrained = submit("a", prompts(30)[0], logprobs=None)
    script = "? " + " ".join(map(str, range(40, 47))) + " ? ?"
    sampling = constrained.sampling.replace(grammar=script, repetition_penalty=1.3)
    submits = [msgspec.structs.replace(constrained, sampling=sampling), *submits_of()[:2]]
    runner = open_runner("llama", kernels=PureKernels(), max_num_seqs=8, max_model_len=128)
    while runner.idle():
        pass
    num_traces, num_replays = replay.num_traces, replay.num_replays
    expected = loops(open_runner("llama", max_num_seqs=8))[0].run(*submits)
    one_by_one, chunked = loops(runner)
    assert one_by_one.run(*submits) == chunked.run(*submits) == expected
    assert (max(one_by_one.num_rows), max(chunked.num_rows)) == (3, 8)
    assert replay.num_traces == num_traces
    assert replay.num_replays > num_replays


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_steps_that_sample_nothing_leave_nothing_to_be_read_later(
    name: str, open_runner: Open, replay: Replay, overwrite_free: Callable[[], None]
) -> None:
    script = " ".join(map(str, range(40, 52))) + " ? ? ?"
    made = [submit(str(i), p, logprobs=None, max_tokens=19, seed=i) for i, p in enumerate(prompts(57, 90))]
    submits = [msgspec.structs.replace(one, sampling=one.sampling.replace(grammar=script)) for one in made]
    config = Config(max_num_seqs=1)
    expected = Loop(open_runner(name, max_num_seqs=1), config, end=2, chunked=False).run(*submits)
    overwrite_free()
    loop = Loop(open_runner(name, kernels=PureKernels(), max_num_seqs=1, max_model_len=128), config, end=2)
    assert loop.run(*submits) == expected
    assert any(not row.samples for step in loop.steps for row in step.decodes)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_whether_a_step_is_started_first_or_last_changes_no_token(
    temperature: float, open_runner: Open, replay: Replay
) -> None:
    def tokens(runner: Runner, *, collects_first: bool) -> dict[str, tuple[int, ...]]:
        config = Config(max_num_seqs=4, prefill_step_size=32)
        return Loop(runner, config, end=2, chunked=False, collects_first=collects_first).run(*submits)

    grammars = ("? 40 ? ? 41 ?", None, "? ? ? ? ? ? ? 50 51 ?")
    submits = [
        msgspec.structs.replace(each, sampling=each.sampling.replace(grammar=grammar))
        for each, grammar in zip(submits_of(temperature=temperature), grammars, strict=False)
    ]
    runners = open_runner("llama", max_num_seqs=4), open_runner("llama", kernels=PureKernels(), max_num_seqs=4)
    found = [tokens(runner, collects_first=first) for runner in runners for first in (False, True)]
    assert found == found[:1] * 4


def test_preemption_and_reused_slots_change_no_token(open_runner: Open, replay: Replay) -> None:
    submits = [submit(str(i), p, max_tokens=40, logprobs=None) for i, p in enumerate(prompts(30, 40, 50, 33))]
    expected = run(open_runner("llama"), submits, config=Config())
    tight = open_runner("llama", kernels=PureKernels(), num_pages=8, max_num_seqs=4)
    assert_same(run(tight, submits, config=Config(prefill_step_size=32, max_num_seqs=4)), expected)


@pytest.mark.parametrize("broken", ["compile", "eval"])
def test_a_step_that_does_not_compile_is_decoded_uncompiled(
    broken: str, open_runner: Open, replay: Replay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    expected = run(open_runner("llama"), submits_of(), config=Config())
    monkeypatch.setattr(decode_step.mx, broken, fail if broken == "eval" else lambda _: fail)
    runner = open_runner("llama", kernels=PureKernels(), max_num_seqs=3, max_model_len=128)
    assert [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert_same(run(runner, submits_of(), config=Config(max_num_seqs=3)), expected)
    assert not runner.idle()


def test_nothing_is_traced_for_requests_once_all_shapes_are_warm(open_runner: Open, replay: Replay) -> None:
    runner = open_runner("llama", kernels=PureKernels(), max_num_seqs=3, max_model_len=128)
    while runner.idle():
        pass
    num_traces = replay.num_traces
    for sampling in ({}, {"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.5}):
        run(runner, submits_of(**sampling), config=Config(max_num_seqs=3), every=2)
    assert replay.num_traces == num_traces
