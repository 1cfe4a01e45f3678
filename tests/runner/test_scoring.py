"""Log-probabilities of prompts: the same whatever else runs, and however the prompt is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest
from driven import prompts, submit

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Submit
from vllm_mlx.core.step import Runner, TokenLogprobs
from vllm_mlx.engine import sequence
from vllm_mlx.engine.scheduler import Scheduler


def scored(runner: Runner, submits: Sequence[Submit], *, config: Config) -> dict[str, list[TokenLogprobs]]:
    """The log-probabilities of every prompt, each position told once."""
    scheduler, in_flight = Scheduler(runner.info, config), None
    found: dict[str, dict[int, TokenLogprobs]] = {one.request_id: {} for one in submits}
    for one in submits:
        scheduler.submit(one)
    while scheduler.has_work or in_flight is not None:
        step = scheduler.plan()
        launched = runner.launch(step) if step is not None else None
        if in_flight is not None:
            scheduler.commit(runner.collect(in_flight))
        in_flight = launched
        for output in scheduler.take_outputs():
            assert output.num_cached == 0
            if (scores := output.prompt_logprobs) is not None:
                assert all(rank >= 1 for rank in scores.ranks)
                for position, value in enumerate(scores.logprobs, start=scores.start):
                    found[output.request_id].setdefault(position, value)
    scheduler.check()
    for one in submits:
        expected = range(1, len(one.prompt)) if one.sampling.prompt_logprobs is not None else ()
        assert sorted(found[one.request_id]) == list(expected)
    return {name: [values[i] for i in sorted(values)] for name, values in found.items()}


def values_of(found: Sequence[TokenLogprobs]) -> list[float]:
    return [each.logprob for each in found]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next", "rwkv7"])
def test_scores_do_not_depend_on_chunks_or_neighbours(
    open_runner: Callable[..., Runner], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(model=name, num_pages=64, max_num_seqs=4)
    runner = open_runner(name)
    short, long, other = prompts(9, 90, 40)
    alone = scored(runner, [submit("long", long, prompt_logprobs=2)], config=config)["long"]
    monkeypatch.setattr(sequence, "MAX_SCORED", 32)
    again = [submit(f"{i}", long, prompt_logprobs=2) for i in range(2)]
    both = scored(runner, [submit("s", short, prompt_logprobs=0), *again, submit("o", other)], config=config)
    for i in range(2):
        assert values_of(both[f"{i}"]) == pytest.approx(values_of(alone), abs=1e-4)
    assert [each.top_ids for each in both["s"]] == [()] * 8
    assert all(len(each.top_ids) == 2 and each.logprob <= each.top_logprobs[0] for each in alone)


def test_scores_survive_preemption(open_runner: Callable[..., Runner]) -> None:
    runner = open_runner("llama", num_pages=9)
    config = Config(model="llama", num_pages=9, max_num_seqs=4)
    found = prompts(60, 60, 60)
    submits = [submit(f"{i}", prompt, prompt_logprobs=1, max_tokens=40) for i, prompt in enumerate(found)]
    together = scored(runner, submits, config=config)
    for one in submits:
        alone = scored(runner, [one], config=config)[one.request_id]
        assert values_of(together[one.request_id]) == pytest.approx(values_of(alone), abs=1e-4)


def test_scores_are_those_of_the_whole_distribution(open_runner: Callable[..., Runner]) -> None:
    runner = open_runner("llama")
    [prompt] = prompts(30)
    config = Config(model="llama", num_pages=64)
    top = scored(runner, [submit("a", prompt, prompt_logprobs=20)], config=config)["a"]
    for each in top:
        assert list(each.top_logprobs) == sorted(each.top_logprobs, reverse=True)
        assert mx.array(each.top_logprobs).exp().sum().item() <= 1.0 + 1e-5
