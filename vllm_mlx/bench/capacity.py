"""The capacity envelope: how many clients a server sustains, for each prompt length, output length and cache state."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from vllm_mlx.bench import metrics
from vllm_mlx.bench.client import ChatClient
from vllm_mlx.bench.envelope import CapacityOptions, Cell, CellMeasure, judge, summarize_cells
from vllm_mlx.bench.http import HttpClient, parse_origin
from vllm_mlx.bench.load import Load, LoadResult, run_load
from vllm_mlx.bench.prompts import NUM_OWN_WORDS, PromptWriter, of_words
from vllm_mlx.bench.rows import Row, request_record
from vllm_mlx.bench.server import Server
from vllm_mlx.bench.session import Progress, Session, now

KIND = "vllm-mlx-capacity-envelope"
FIELDS = (
    *("run_id", "timestamp", "tag", "model_id", "prompt_tokens_requested", "output_tokens_requested", "cache_mode"),
    *("concurrency", "num_requests", "failures", "failure_rate", "ooms", "timeouts", "prompt_tokens"),
    *("completion_tokens", "cached_fraction", "cache_verified", "baseline_equal"),
    *("ttft_ms", "tpot_ms", "chunk_gap_ms", "e2e_latency_ms"),
    *("throughput_tps", "requests_per_s", "verdict", "sustainable", "reasons"),
)
"""Columns of the flat formats."""
_PROBE_WORDS = (40, 240)
_MEASUREMENT: Mapping[str, str] = {
    "clock": "client, from before the connection is opened",
    "ttft_ms": "to the first chunk with text, reasoning or a tool call",
    "chunk_gap_ms": "between such chunks, of all requests of a cell together",
    "percentiles": "linear between neighbours (R-7)",
    "throughput_tps": "output tokens of complete answers over the time of the cell's batches",
}


@dataclass(slots=True)
class CapacityResult:
    """What was measured so far."""

    cells: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    cache_events: list[Row] = field(default_factory=list)
    baseline_checks: list[Row] = field(default_factory=list)
    words: dict[int, int] = field(default_factory=dict)
    """Prompt tokens -> words that give about as many."""


class Capacity:
    """Runs every cell of a session."""

    def __init__(
        self, session: Session, options: CapacityOptions, *, result: CapacityResult, progress: Progress
    ) -> None:
        self._session = session
        self._options = options
        self._result = result
        self._progress = progress
        self._own = PromptWriter(session.options.seed)
        self._shared = PromptWriter(session.options.seed, is_shared=True)

    async def run(self) -> None:
        """Until the last cell. Raises ServerUnusable if the baseline cannot be asked."""
        self._result.words |= await self._calibrate()
        equal = await self._compare_baseline()
        for cell in self.cells():
            measure = CellMeasure([], is_baseline_equal=equal.get((cell.prompt_tokens, cell.output_tokens)))
            try:
                await self._measure(cell, measure)
            finally:
                self._add(cell, measure)

    def cells(self) -> Iterator[Cell]:
        """In the order in which they run."""
        options = self._options
        return itertools.starmap(
            Cell,
            itertools.product(options.prompt_tokens, options.output_tokens, options.cache_modes, options.concurrencies),
        )

    async def _calibrate(self) -> dict[int, int]:
        """How many words give how many tokens, from two probes; a word a token if the server counts none."""
        counts: list[int] = []
        for words in _PROBE_WORDS:
            messages = self._own.write(of_words(words), 0, run="probe")
            sample = await self._session.client.send(self._encode(messages, 1))
            counts.append(sample.usage_prompt_tokens or 0)
        per_word = (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
        if not all(counts) or per_word <= 0:
            return {tokens: tokens for tokens in self._options.prompt_tokens}
        around = counts[0] - per_word * _PROBE_WORDS[0]
        least = NUM_OWN_WORDS
        return {tokens: max(least, round((tokens - around) / per_word)) for tokens in self._options.prompt_tokens}

    async def _compare_baseline(self) -> dict[tuple[int, int], bool]:
        """One greedy answer of each size from both servers."""
        url, equal = self._options.baseline_url, {}
        if url is None:
            return {}
        target = self._session.options.target
        http = HttpClient(parse_origin(url), api_key=target.api_key, timeout_s=target.timeout_s)
        model = await Server(http, url=url).choose_model(target.model)
        baseline = ChatClient(http, model=model, endpoint=target.endpoint)
        for size in itertools.product(self._options.prompt_tokens, self._options.output_tokens):
            messages = self._own.write(of_words(self._result.words[size[0]]), 0, run="baseline")
            ask = self._ask(messages, size[1])
            ours, theirs = await self._session.client.ask(ask), await baseline.ask(ask)
            equal[size] = ours.is_ok and theirs.is_ok and ours.content == theirs.content
            record = {"prompt_tokens_requested": size[0], "output_tokens_requested": size[1], "equal": equal[size]}
            self._result.baseline_checks.append(record)
        return equal

    async def _measure(self, cell: Cell, measure: CellMeasure) -> None:
        self._progress.begin(cell.name, self._options.repetitions * cell.concurrency)
        for number in range(self._options.warmup):
            messages = self._own.write(of_words(self._result.words[cell.prompt_tokens]), number, run=f"{cell}/warm-up")
            await self._session.client.send(self._encode(messages, cell.output_tokens))
        for repetition in range(1, self._options.repetitions + 1):
            bodies = await self._prepare(cell, repetition)
            await self._repeat(cell, repetition, bodies, measure=measure)

    async def _prepare(self, cell: Cell, repetition: int) -> list[bytes]:
        """Bring the cache into its state; returns the requests to measure."""
        prompts, run = of_words(self._result.words[cell.prompt_tokens]), f"{cell}/{repetition}"
        writer = self._shared if cell.cache_mode == "prefix-hit" else self._own
        bodies = [self._encode(writer.write(prompts, i, run=run), cell.output_tokens) for i in range(cell.concurrency)]
        match cell.cache_mode:
            case "cold":
                outcome = await self._session.server.reset_cache()
                self._note(cell, repetition, "reset", outcome)
            case "warm":
                outcomes = [await self._prime(body) for body in bodies]
                self._note(cell, repetition, "same prompts sent before", ", ".join(sorted(set(outcomes))))
            case "prefix-hit":
                first = self._encode(writer.write(prompts, cell.concurrency, run=run), 1)
                self._note(cell, repetition, "same beginning sent before", await self._prime(first))
        return bodies

    async def _prime(self, body: bytes) -> str:
        sample = await self._session.client.send(body)
        return "answered" if sample.failure is None else sample.failure.label

    async def _repeat(self, cell: Cell, repetition: int, bodies: Sequence[bytes], *, measure: CellMeasure) -> None:
        result, change = LoadResult(), dict[str, float]()
        try:
            async with self._session.counting(change):
                await run_load(
                    bodies,
                    Load(cell.concurrency),
                    send=lambda body, origin_s: self._session.client.send(body, origin_s=origin_s),
                    result=result,
                    on_done=lambda _: self._progress.advance(),
                )
        finally:
            measure.samples += result.samples
            measure.wall_s += result.wall_s
            if (saved := metrics.tokens_saved(change)) is not None:
                measure.tokens_saved = (measure.tokens_saved or 0.0) + saved
            where = {"cell": cell.name, "repetition": repetition}
            self._result.samples += [where | request_record(sample) for sample in result.samples]

    def _add(self, cell: Cell, measure: CellMeasure) -> None:
        if measure.samples:
            row = self._session.identity() | judge(cell, measure, self._options.objectives)
            self._result.cells.append(row | self._session.options.overrides)

    def _note(self, cell: Cell, repetition: int, action: str, outcome: str) -> None:
        event = {"at": now(), "cell": cell.name, "repetition": repetition, "action": action, "result": outcome}
        self._result.cache_events.append(event)

    def _encode(self, messages: Any, max_tokens: int) -> bytes:
        return self._session.client.encode(self._ask(messages, max_tokens))

    def _ask(self, messages: Any, max_tokens: int) -> Any:
        """Greedy, with what the run adds to every request."""
        questions = self._session.options.questions
        return self._session.ask(
            messages,
            max_tokens=max_tokens,
            thinking=questions.thinking[0],
            extra_body=questions.extra_bodies[0],
            temperature=0.0,
        )


def document(session: Session, options: CapacityOptions, result: CapacityResult) -> Row:
    """The artifact."""
    provenance = session.provenance()
    questions = session.options.questions
    workload = asdict(options) | {
        "temperature": 0.0,
        "ignore_eos": questions.ignore_eos,
        "enable_thinking": questions.thinking[0],
        "extra_body": dict(questions.extra_bodies[0]),
    }
    words = {str(tokens): count for tokens, count in result.words.items()}
    return {
        "kind": KIND,
        "schema_version": 1,
        "run_id": session.run_id,
        "started_at": session.started_at,
        "finished_at": now(),
        "workload_hash": digest(workload),
        "provenance_hash": digest(provenance),
        "workload": workload,
        "provenance": provenance,
        "baseline_url": options.baseline_url,
        "baseline_checks": result.baseline_checks,
        "summary": summarize_cells(result.cells),
        "measurement": {**_MEASUREMENT, "words_for_prompt_tokens": words},
        "cache_events": result.cache_events,
        "cells": result.cells,
        "samples": result.samples,
    }


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()
