"""How fast an engine prefills and decodes: random prompts of given lengths, all at once, no text and no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import statistics
import time
from collections.abc import Sequence

import msgspec

from vllm_mlx.core.errors import ConfigError, EngineFailure
from vllm_mlx.core.messages import EngineClient, FinishReason, Stats, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import RunnerInfo

MAX_TRIM = 4
"""Steps left out at either end of a round's decoding, if there are enough."""
REPORT_TIMEOUT_S = 2.0
"""How long an engine's report is waited for: the next one while all rows decode, and the one of its rest."""
REPORT_POLL_S = 0.01

Arrival = tuple[float, int]
"""When (`time.perf_counter()`) a row got tokens, and how many."""


class Scenario(msgspec.Struct, frozen=True):
    """Prompts that run together."""

    text: str
    """As it was asked for: `1x16384+31x256` is one prompt of 16384 tokens and 31 of 256."""
    lengths: tuple[int, ...]
    """Tokens of each prompt."""

    @property
    def rows(self) -> int:
        """Sequences that decode together."""
        return len(self.lengths)


class Round(msgspec.Struct, frozen=True):
    """What one run of a scenario gave."""

    ttft_s: tuple[float, ...]
    """Of each row: from the submission of all rows to its first token."""
    steps_s: tuple[float, ...]
    """Decode steps while all rows decoded, without the first and the last few."""
    num_tokens: int
    """Tokens that all rows got in these steps."""
    stats: Stats
    """The engine's report when all was over."""
    pages_used: int | None
    """While all rows decoded; None if the round was over before the engine told."""
    num_preemptions: int


class Figures(msgspec.Struct, frozen=True):
    """A scenario's result over all its rounds."""

    scenario: str
    rows: int
    prompt_tokens: int
    prefill_tokens_per_s: float
    """Prompt tokens over the time until the last row had its first token."""
    ttft_p50_s: float
    ttft_p95_s: float
    decode_step_ms: float
    """Median while all rows decode; so are the next two."""
    decode_step_p95_ms: float
    decode_tokens_per_s: float
    num_steps: int
    """Decode steps that were measured."""
    peak_memory_bytes: int
    """Most that the device held since the engine started."""
    pages_used: int | None
    """Most of any round, while all rows decoded; None if the rounds were too short for the engine to tell."""
    num_preemptions: int
    """Not 0: the KV cache was too small, and the figures say little."""


def parse_scenario(text: str) -> Scenario:
    """Read `ROWSxTOKENS[+ROWSxTOKENS...]`. Raises ConfigError if it is something else."""
    lengths: list[int] = []
    for part in text.replace(" ", "").lower().split("+"):
        found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,7})", part)
        if found is None:
            raise ConfigError(f"--scenario: {text!r} is not ROWSxTOKENS, like 16x2048 or 1x16384+31x256")
        lengths += [int(found[2])] * int(found[1])
    return Scenario(text, tuple(lengths))


def check_scenario(scenario: Scenario, info: RunnerInfo, *, max_num_seqs: int, max_tokens: int) -> None:
    """Raise ConfigError unless all rows can decode `max_tokens` tokens side by side."""
    if scenario.rows > max_num_seqs:
        raise ConfigError(f"--scenario {scenario.text}: more rows than --max-num-seqs {max_num_seqs}")
    longest = max(scenario.lengths) + max_tokens
    if longest > info.max_model_len:
        raise ConfigError(
            f"--scenario {scenario.text}: {longest} tokens with the output; the context has {info.max_model_len}"
        )
    pages_for = info.cache.page_groups.pages_for
    num_pages = sum(pages_for(length + max_tokens) for length in scenario.lengths)
    if info.num_pages and num_pages > info.num_pages - 1:
        raise ConfigError(
            f"--scenario {scenario.text}: needs {num_pages} pages; the KV cache has {info.num_pages - 1} "
            "(--cache-memory-mb)"
        )


def random_prompts(scenario: Scenario, *, seed: str, vocab_size: int) -> list[tuple[int, ...]]:
    """Token ids of every row; the same seed gives the same ones."""
    draw = random.Random(seed)
    return [tuple(draw.choices(range(vocab_size), k=length)) for length in scenario.lengths]


async def measure(
    client: EngineClient, scenario: Scenario, *, max_tokens: int, seed: str, temperature: float = 0.0
) -> Round:
    """Run all rows until the last one to start has `max_tokens` tokens; nobody stops earlier. `seed` names the round.

    Raises:
        EngineFailure: a row failed, or the engine did and was started again.
        ConfigError: a row came to the end of the context or of the KV cache first.
    """
    status = client.status()
    info, num_restarts = status.info, status.num_restarts
    assert info is not None, "the engine is not started"
    submits = []
    for number, token_ids in enumerate(random_prompts(scenario, seed=seed, vocab_size=info.vocab_size)):
        max_new = info.max_model_len - len(token_ids)
        sampling = SamplingParams(temperature=temperature, seed=number, ignore_eos=True, max_tokens=max_new)
        submits.append(Submit(f"{seed}-{number}", Prompt(token_ids), sampling))
    watch = _Watch(client, scenario.rows, max_tokens)
    tasks = [asyncio.create_task(watch.follow(number, submit)) for number, submit in enumerate(submits)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await watch.rest()
    if client.status().num_restarts != num_restarts:
        raise EngineFailure("The engine died during the measurement and was started again.")
    return watch.round()


def steady_steps(arrivals: Sequence[Sequence[Arrival]], *, last: int, enough_at: float) -> tuple[list[float], int]:
    """Seconds of each step while all rows decoded, without the first and the last few, and the tokens of these steps.

    `last` is the row that started last: its tokens up to `enough_at` mark the steps.
    """
    times = [at for at, _ in arrivals[last] if at <= enough_at]
    trim = min(MAX_TRIM, len(times) // 8)
    times = times[trim : len(times) - trim]
    num_tokens = sum(count for row in arrivals for at, count in row if times[0] < at <= times[-1])
    return [after - before for before, after in itertools.pairwise(times)], num_tokens


def summarise(scenario: Scenario, rounds: Sequence[Round]) -> Figures:
    """One line of all rounds."""
    ttft_s = sorted(itertools.chain.from_iterable(r.ttft_s for r in rounds))
    steps_s = sorted(itertools.chain.from_iterable(r.steps_s for r in rounds))
    prompt_tokens = sum(scenario.lengths)
    return Figures(
        scenario=scenario.text,
        rows=scenario.rows,
        prompt_tokens=prompt_tokens,
        prefill_tokens_per_s=statistics.median(prompt_tokens / max(r.ttft_s) for r in rounds),
        ttft_p50_s=percentile(ttft_s, 50),
        ttft_p95_s=percentile(ttft_s, 95),
        decode_step_ms=1000 * percentile(steps_s, 50),
        decode_step_p95_ms=1000 * percentile(steps_s, 95),
        decode_tokens_per_s=sum(r.num_tokens for r in rounds) / sum(steps_s),
        num_steps=len(steps_s),
        peak_memory_bytes=max(r.stats.memory.peak for r in rounds),
        pages_used=max((r.pages_used for r in rounds if r.pages_used is not None), default=None),
        num_preemptions=sum(r.num_preemptions for r in rounds),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, between the two that are nearest."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class _Watch:
    """Notes when each row gets tokens, and lets all rows end together. Begins when it is made."""

    def __init__(self, client: EngineClient, rows: int, max_tokens: int) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self._arrivals: list[list[Arrival]] = [[] for _ in range(rows)]
        self._num_unstarted = rows
        self._last = 0
        """The row that started last."""
        self._enough_at: float | None = None
        self._steps_then = 0
        self._is_over = False
        self._pages_used: int | None = None
        self._before = client.status().stats
        self._begun = time.perf_counter()

    async def follow(self, number: int, submit: Submit) -> None:
        """Read one row until all are to end."""
        arrivals = self._arrivals[number]
        async with contextlib.aclosing(self._client.generate(submit)) as outputs:
            async for output in outputs:
                if self._is_over:
                    return
                if output.finish in (FinishReason.ERROR, FinishReason.REJECTED):
                    raise EngineFailure(output.message or "The engine failed.")
                if output.finish is not None:
                    self._ended(len(submit.prompt))
                    return
                if not output.token_ids:
                    continue  # it only tells what was found of the prompt
                if not arrivals:
                    self._num_unstarted -= 1
                    self._last = number
                arrivals.append((time.perf_counter(), len(output.token_ids)))
                if number == self._last and not self._num_unstarted:
                    self._look(arrivals[-1][0])

    def _look(self, now: float) -> None:
        """All rows decode, and the one that started last got more: was that enough?"""
        if self._enough_at is None:
            if sum(count for _, count in self._arrivals[self._last]) >= self._max_tokens:
                self._enough_at = now
                self._steps_then = self._client.status().stats.num_steps
            return
        # The next report tells of a moment when all rows decoded.
        stats = self._client.status().stats
        if stats.num_steps > self._steps_then:
            self._pages_used = stats.pages_used
            self._is_over = True
        self._is_over = self._is_over or now > self._enough_at + REPORT_TIMEOUT_S

    def _ended(self, num_prompt: int) -> None:
        """A row came to the end of the context, or of the KV cache."""
        if self._enough_at is None:
            raise ConfigError(
                f"a row of {num_prompt} prompt tokens ended before all rows had decoded; "
                "raise --max-model-len or --cache-memory-mb"
            )
        self._is_over = True

    async def rest(self) -> None:
        """When every row has ended: wait for the engine's report that nothing runs any more."""
        for _ in range(int(REPORT_TIMEOUT_S / REPORT_POLL_S)):
            stats = self._client.status().stats
            if stats.num_steps > self._before.num_steps and not stats.num_running:
                return
            await asyncio.sleep(REPORT_POLL_S)

    def round(self) -> Round:
        """What it gave."""
        assert self._enough_at is not None
        stats = self._client.status().stats
        steps_s, num_tokens = steady_steps(self._arrivals, last=self._last, enough_at=self._enough_at)
        return Round(
            ttft_s=tuple(row[0][0] - self._begun for row in self._arrivals),
            steps_s=tuple(steps_s),
            num_tokens=num_tokens,
            stats=stats,
            pages_used=self._pages_used,
            num_preemptions=stats.num_preemptions - self._before.num_preemptions,
        )
