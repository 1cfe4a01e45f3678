"""`vllm-mlx bench`: what the engine does without HTTP and without text, with the settings that `serve` would have."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_mlx import __version__
from vllm_mlx.cli.bench_options import BenchOptions
from vllm_mlx.cli.compose import open_engine
from vllm_mlx.cli.display import Display
from vllm_mlx.cli.settings import settings
from vllm_mlx.core import log
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import EngineFailure, EngineStartError
from vllm_mlx.core.messages import EngineClient
from vllm_mlx.core.step import RunnerInfo
from vllm_mlx.engine.measure import Figures, Scenario, check_scenario, measure, parse_scenario, summarise
from vllm_mlx.models.resolve import resolve

GROUPS = ("model", "engine")
"""Of the settings that it reads."""
PIPE_WIDTH = 120
"""Columns of a table that does not go to a terminal."""


def bench(config: Config, options: BenchOptions) -> int:
    """Measure every scenario and print the results; returns the exit code. Ctrl-C prints what there is so far.

    Raises:
        ConfigError: a scenario does not fit the model or its KV cache.
        StartupError: the model or the engine cannot be had, or the engine failed.
    """
    log.setup("warning")
    scenarios = [parse_scenario(text) for text in options.scenarios]
    run = _Run(config, options)
    try:
        with Display() as display:
            path = resolve(config, progress=display, needs_tokenizer=False).path
            asyncio.run(run.measure_all(path, scenarios, display))
    except KeyboardInterrupt:
        run.tell()
        raise
    except EngineFailure as error:
        raise EngineStartError(error.message) from error
    run.tell()
    return 0


class _Run:
    """One engine, and the figures that it gave so far."""

    def __init__(self, config: Config, options: BenchOptions) -> None:
        self._config = config
        self._options = options
        self._info: RunnerInfo | None = None
        self._figures: list[Figures] = []

    async def measure_all(self, path: Path, scenarios: Sequence[Scenario], display: Display) -> None:
        """Start the engine, run every scenario, stop it."""
        engine = open_engine(self._config, path, on_progress=display)
        try:
            self._info = await engine.start()
            for scenario in scenarios:
                check_scenario(
                    scenario,
                    self._info,
                    max_num_seqs=self._config.max_num_seqs,
                    max_tokens=self._options.max_tokens,
                )
            for scenario in scenarios:
                self._figures.append(await self._measure(engine, scenario, display))
        finally:
            await engine.stop()

    async def _measure(self, engine: EngineClient, scenario: Scenario, display: Display) -> Figures:
        """The warm-up rounds, then those that count; every round has prompts of its own."""
        rounds = []
        total = self._options.warmup + self._options.repetitions
        for number in range(total):
            display(f"measuring {scenario.text}", number / total)
            one = await measure(
                engine,
                scenario,
                max_tokens=self._options.max_tokens,
                seed=f"{self._options.seed}-{scenario.text}-{number}",
                temperature=self._options.temperature,
            )
            rounds.append(one)
        return summarise(scenario, rounds[self._options.warmup :])

    def tell(self) -> None:
        """Print the results, and write them to the file if one was named."""
        info = self._info
        if info is None:
            return
        text = json.dumps(self._report(info), indent=2) + "\n"
        if self._options.output is not None:
            self._options.output.write_text(text, encoding="utf-8")
        if self._options.format == "json":
            sys.stdout.write(text)
            return
        title = f"{self._config.model_name} on {info.device} ({info.backend}, {info.dtype})"
        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
        console.print(_table(title, self._figures))

    def _report(self, info: RunnerInfo) -> dict[str, Any]:
        """What is needed to repeat the measurement, and what it gave."""
        given, options = asdict(self._config), asdict(self._options)
        changed = {s.name: given[s.name] for s in settings(GROUPS) if given[s.name] != s.default}
        return {
            "version": __version__,
            "model": self._config.model,
            "backend": info.backend,
            "device": info.device,
            "dtype": info.dtype,
            "notes": info.notes,
            "max_model_len": info.max_model_len,
            "num_pages": info.num_pages,
            "page_size": info.cache.page_size,
            "weights_bytes": info.memory.weights,
            "settings": changed,
            "options": {name: value for name, value in options.items() if name not in ("output", "format")},
            "results": [msgspec.to_builtins(figures) for figures in self._figures],
        }


def _table(title: str, lines: Sequence[Figures]) -> Table:
    """One line per scenario."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("scenario")
    for name in ("prefill tok/s", "TTFT p50 s", "p95 s", "step ms", "p95 ms", "decode tok/s", "peak GB", "pages"):
        table.add_column(name, justify="right")
    for f in lines:
        table.add_row(
            f"{f.scenario} (preempted {f.num_preemptions}x)" if f.num_preemptions else f.scenario,
            f"{f.prefill_tokens_per_s:,.0f}",
            f"{f.ttft_p50_s:.3f}",
            f"{f.ttft_p95_s:.3f}",
            f"{f.decode_step_ms:.2f}",
            f"{f.decode_step_p95_ms:.2f}",
            f"{f.decode_tokens_per_s:,.1f}",
            f"{f.peak_memory_bytes / 1e9:.2f}",
            "-" if f.pages_used is None else f"{f.pages_used:,}",
        )
    return table
