"""The prompt sweep: every combination of prompts, load and options, repeated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_mlx.bench import metrics
from vllm_mlx.bench.load import Load, LoadResult, run_load
from vllm_mlx.bench.options import SweepOptions
from vllm_mlx.bench.prompts import PromptSet, PromptWriter
from vllm_mlx.bench.rows import Row, cache_fields, distributions, measure, request_record
from vllm_mlx.bench.sample import Sample
from vllm_mlx.bench.session import Progress, Session

KIND = "vllm-mlx-bench-serve"
_WARM_UP = -1


@dataclass(frozen=True, slots=True)
class Configuration:
    """One combination."""

    prompts: PromptSet
    concurrency: int | None
    rate: float | None
    thinking: bool | None
    extra_body: Mapping[str, Any]

    @property
    def label(self) -> str:
        """For the progress display."""
        load = f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g} requests/s"
        thinking = "" if self.thinking is None else f", thinking {'on' if self.thinking else 'off'}"
        return f"{self.prompts.name}, {load}{thinking}"


@dataclass(slots=True)
class SweepResult:
    """What was measured so far. It is filled while the run goes on, so that an end by force loses nothing."""

    rows: list[Row] = field(default_factory=list)
    summaries: list[Row] = field(default_factory=list)


class Sweep:
    """Runs all configurations of a session, one after the other."""

    def __init__(self, session: Session, options: SweepOptions, *, result: SweepResult, progress: Progress) -> None:
        self._session = session
        self._options = options
        self._result = result
        self._progress = progress
        self._writer = PromptWriter(session.options.seed, options.is_shared_prefix, options.system_prompt)
        self._counted: dict[str, int] = {}

    async def run(self) -> None:
        """Until the last repetition of the last configuration."""
        for number, configuration in enumerate(self.configurations()):
            await self._session.server.reset_cache()
            await self._warm_up(configuration, number)
            done: list[LoadResult] = []
            try:
                for repetition in range(1, self._options.repetitions + 1):
                    done.append(LoadResult())
                    await self._repeat(configuration, number, repetition, result=done[-1])
            finally:
                self._summarize(configuration, done)

    def configurations(self) -> Iterator[Configuration]:
        """Every combination, in the order in which they run."""
        options, questions = self._options, self._session.options.questions
        for combination in itertools.product(
            options.prompt_sets, options.concurrencies, options.rates, questions.thinking, questions.extra_bodies
        ):
            yield Configuration(*combination)

    def num_requests(self, configuration: Configuration) -> int:
        """Per repetition."""
        if self._options.num_requests is not None:
            return self._options.num_requests
        natural = configuration.prompts.size if configuration.prompts.is_block else 1
        return max(configuration.concurrency or 1, natural)

    async def _warm_up(self, configuration: Configuration, number: int) -> None:
        """Rounds that do not count; they also tell whether the server reports tokens."""
        samples: list[Sample] = []
        for round_ in range(self._options.warmup):
            result = LoadResult()
            await self._send(configuration, number, f"warm-up {round_}", result=result)
            samples += result.samples
        name = configuration.prompts.name
        silent = samples and all(sample.is_ok and sample.usage_prompt_tokens is None for sample in samples)
        if silent and not self._options.skip_token_count and name not in self._counted:
            await self._count_tokens(configuration)

    async def _count_tokens(self, configuration: Configuration) -> None:
        """Ask for one token of one prompt, not streamed: some servers report token counts only so."""
        ask = self._ask(configuration, 0, run="token count")
        count = await self._session.client.count_prompt_tokens(ask)
        if count is not None:
            self._counted[configuration.prompts.name] = count

    async def _repeat(self, configuration: Configuration, number: int, repetition: int, *, result: LoadResult) -> None:
        change: dict[str, float] = {}
        memory: dict[str, Any] = {}
        try:
            async with self._session.counting(change):
                await self._send(configuration, number, f"repetition {repetition}", result=result)
            memory |= await self._session.server.memory()
        finally:
            self._add_row(configuration, result, repetition=repetition, change=change, memory=memory)

    async def _send(self, configuration: Configuration, number: int, part: str, *, result: LoadResult) -> None:
        count = self.num_requests(configuration)
        run = f"{number}/{part}"
        bodies = [self._session.client.encode(self._ask(configuration, i, run=run)) for i in range(count)]
        load = Load(configuration.concurrency, configuration.rate, self._session.options.seed)
        self._progress.begin(f"{configuration.label}: {part}", count)
        await run_load(
            bodies,
            load,
            send=lambda body, origin_s: self._session.client.send(body, origin_s=origin_s),
            result=result,
            on_done=lambda _: self._progress.advance(),
        )

    def _ask(self, configuration: Configuration, index: int, *, run: str) -> Any:
        questions = self._session.options.questions
        return self._session.ask(
            self._writer.write(configuration.prompts, index, run=run),
            max_tokens=questions.max_tokens,
            thinking=configuration.thinking,
            extra_body=configuration.extra_body,
            temperature=questions.temperature,
        )

    def _add_row(
        self,
        configuration: Configuration,
        result: LoadResult,
        *,
        repetition: int,
        change: metrics.Counters,
        memory: Row,
    ) -> None:
        if not result.samples:
            return
        row = self._measured(configuration, result.samples, result.wall_s)
        row |= cache_fields(change) | memory
        row |= {"repetition": repetition, "complete": result.is_complete, "metrics_delta": metrics.changed(change)}
        if self._options.include_requests:
            row["requests"] = [request_record(sample) for sample in result.samples]
        self._result.rows.append(row | self._session.options.overrides)

    def _summarize(self, configuration: Configuration, done: list[LoadResult]) -> None:
        """All repetitions together."""
        samples = [sample for result in done for sample in result.samples]
        if not samples:
            return
        wall_s = sum(result.wall_s for result in done)
        row = self._measured(configuration, samples, wall_s)
        row |= {"repetitions": len(done), "complete": all(result.is_complete for result in done)}
        spread = distributions([sample for sample in samples if sample.is_ok])
        row["statistics"] = {name: summary._asdict() if summary else None for name, summary in spread.items()}
        self._result.summaries.append(row | self._session.options.overrides)

    def _measured(self, configuration: Configuration, samples: Sequence[Sample], wall_s: float) -> Row:
        """What identifies a row, and what the client measured."""
        row = self._session.identity() | self._session.facts | self._described(configuration)
        row |= measure(samples, wall_s, validate=self._options.validate)
        if row["prompt_tokens"] is None:
            row["prompt_tokens"] = self._counted.get(configuration.prompts.name)
        return row

    def _described(self, configuration: Configuration) -> Row:
        return {
            "prompt_set": configuration.prompts.name,
            "concurrency": configuration.concurrency,
            "request_rate": None if configuration.rate is None else f"{configuration.rate:g}",
            "max_tokens": self._session.options.questions.max_tokens,
            "enable_thinking": configuration.thinking,
            "extra_body": dict(configuration.extra_body) or None,
            "endpoint": self._session.options.target.endpoint,
        }
