"""Runs sequences through a real scheduler and a runner, step by step, on the calling thread."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from tiny_models import VOCAB_SIZE

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import FinishReason, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import Runner, TokenLogprobs
from vllm_mlx.engine.scheduler import Scheduler


class Answer(NamedTuple):
    """What one sequence generated."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of these lengths."""
    draw = random.Random(seed)
    return [tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in lengths]


def submit(name: str, prompt: Sequence[int], **sampling: object) -> Submit:
    """A greedy sequence of 12 tokens with log-probabilities, unless said otherwise."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "seed": 1, "logprobs": 3, **sampling})
    return Submit(name, Prompt(tuple(prompt)), params)


def run(
    runner: Runner, submits: Sequence[Submit], *, config: Config, every: int = 0, overlap: bool = True
) -> dict[str, Answer]:
    """Run all sequences; one joins every `every` steps. With `overlap`, step N+1 starts before N's tokens are read."""
    scheduler = Scheduler(runner.info, config)
    waiting, in_flight, num_steps = list(submits), None, 0
    tokens: dict[str, list[int]] = defaultdict(list)
    logprobs: dict[str, list[TokenLogprobs | None]] = defaultdict(list)
    while waiting or scheduler.has_work or in_flight is not None:
        while waiting and num_steps >= every * (len(submits) - len(waiting)):
            scheduler.submit(waiting.pop(0))
        step = scheduler.plan()
        launched = runner.launch(step) if step is not None else None
        if not overlap and in_flight is None:
            in_flight, launched = launched, None
        if in_flight is not None:
            scheduler.commit(runner.collect(in_flight))
        in_flight = launched
        num_steps += 1
        for output in scheduler.take_outputs():
            assert output.finish is not FinishReason.ERROR, output.message
            tokens[output.request_id] += output.token_ids
            logprobs[output.request_id] += output.logprobs or ()
        scheduler.check()
    assert scheduler.stats().pages_used == 0
    return {name: Answer(tuple(tokens[name]), tuple(logprobs[name])) for name in tokens}


def run_alone(runner: Runner, submits: Sequence[Submit], *, config: Config) -> dict[str, Answer]:
    """Run the sequences one after the other."""
    answers: dict[str, Answer] = {}
    for one in submits:
        answers |= run(runner, [one], config=config)
    return answers


def assert_same(found: dict[str, Answer], expected: dict[str, Answer], *, tolerance: float = 1e-4) -> None:
    """Same tokens, and log-probabilities within `tolerance`."""
    assert found.keys() == expected.keys()
    for name, answer in expected.items():
        assert found[name].token_ids == answer.token_ids, name
        for one, other in zip(found[name].logprobs, answer.logprobs, strict=True):
            if one is not None and other is not None:
                assert abs(one.logprob - other.logprob) < tolerance, name
