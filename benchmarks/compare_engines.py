"""Our engine against mlx-lm's `BatchGenerator`, on the same model folder and the same prompts, without HTTP.

    python benchmarks/compare_engines.py FOLDER [--scenario 16x2048] [--scenario 1x16384+31x256] [--max-tokens 64]
        [--prototype "PATH [ARGUMENTS]"] [--output results.json] [-- --cache-memory-mb 20000 ...]

Each engine runs each scenario in a process of its own, one after the other, so that memory is clean. What is measured
is the same for both: all prompts at once, then decode steps while all rows decode, the first and the last few left out.
What follows `--` are settings of our engine, spelled as for `vllm-mlx bench`. `--prototype` runs a script that prints
lines like `16 x 2048    kernel+compile     8.70 ms     1840 tok/s  peak 10.8 GB`, if it exists, and compares with them.

Needs MLX, mlx-lm, NumPy and msgspec; without pyzmq our engine runs on a thread.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vllm_mlx.cli.parser import find_command, parse
from vllm_mlx.cli.settings import make_config
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Stats
from vllm_mlx.core.step import MemoryUse
from vllm_mlx.engine.measure import (
    Arrival,
    Figures,
    Round,
    Scenario,
    check_scenario,
    measure,
    parse_scenario,
    random_prompts,
    steady_steps,
    summarise,
)
from vllm_mlx.runner import blas

SCENARIOS = ("1x16384", "16x2048", "1x16384+31x256", "4x8192+60x512")
ENGINES = ("ours", "mlx-lm")
PROTOTYPE_LINE = re.compile(r"(\S.*?)\s{2,}(\S+)\s+([\d.]+) ms\s+([\d.,]+) tok/s\s+peak ([\d.]+) GB")
PROTOTYPE_TIMEOUT_S = 1500


class Job(msgspec.Struct, frozen=True):
    """What a child process measures."""

    engine: str
    folder: str
    scenario: str
    max_tokens: int
    warmup: int
    repetitions: int
    seed: int
    temperature: float
    settings: list[str]

    @property
    def seeds(self) -> list[str]:
        """One for every round; both engines get the same prompts."""
        return [f"{self.seed}-{self.scenario}-{number}" for number in range(self.warmup + self.repetitions)]


class PrototypeLine(msgspec.Struct, frozen=True):
    """A line that the prototype printed."""

    scenario: str
    mode: str
    step_ms: float
    tokens_per_s: float
    peak_gb: float


@dataclass
class Comparison:
    """Everything measured, by scenario."""

    figures: dict[str, dict[str, Figures]] = field(default_factory=dict)
    prototype: list[PrototypeLine] = field(default_factory=list)

    def lines_of(self, scenario: str) -> list[tuple[str, float, float, float]]:
        """Name, step ms, tokens/s and peak GB of everything that ran this scenario."""
        found = [
            (name, f.decode_step_ms, f.decode_tokens_per_s, f.peak_memory_bytes / 1e9)
            for name, f in self.figures.get(scenario, {}).items()
        ]
        wanted = plain(scenario)
        return found + [
            (f"prototype {line.mode}", line.step_ms, line.tokens_per_s, line.peak_gb)
            for line in self.prototype
            if plain(line.scenario) == wanted
        ]


# ---- in the child ----


def run_child(job: Job) -> Figures:
    """Measure; MLX is imported here only."""
    scenario = parse_scenario(job.scenario)
    rounds = asyncio.run(our_rounds(job, scenario)) if job.engine == "ours" else library_rounds(job, scenario)
    return summarise(scenario, rounds[job.warmup :])


async def our_rounds(job: Job, scenario: Scenario) -> list[Round]:
    """Through the same client and engine as the server's."""
    from vllm_mlx.cli.compose import open_engine

    given = vars(parse(find_command("bench"), [job.folder, *job.settings]))
    given = {"engine_start_attempts": 1, **given}
    if importlib.util.find_spec("zmq") is None:
        given = {"engine": "thread", **given}
    config: Config = make_config(given, os.environ)
    engine = open_engine(config, Path(job.folder))
    try:
        info = await engine.start()
        print("; ".join([f"ours: {info.backend}, {info.dtype}, {config.engine}", *info.notes]), file=sys.stderr)
        check_scenario(scenario, info, max_num_seqs=config.max_num_seqs, max_tokens=job.max_tokens)
        return [
            await measure(engine, scenario, max_tokens=job.max_tokens, seed=seed, temperature=job.temperature)
            for seed in job.seeds
        ]
    finally:
        await engine.stop()


def library_rounds(job: Job, scenario: Scenario) -> list[Round]:
    """mlx-lm's continuous batching, as its server drives it."""
    from vllm_mlx.runner.load import untouched_file_limit

    with untouched_file_limit():
        from mlx_lm.utils import load_model
    model, config = load_model(Path(job.folder))
    vocab_size = config["vocab_size"]
    return [library_round(model, scenario, vocab_size, seed=seed, job=job) for seed in job.seeds]


def library_round(model: Any, scenario: Scenario, vocab_size: int, *, seed: str, job: Job) -> Round:
    """All prompts at once, until the last row to start has its tokens."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    prompts = [list(prompt) for prompt in random_prompts(scenario, seed=seed, vocab_size=vocab_size)]
    sampler = make_sampler(job.temperature) if job.temperature else None
    generator = BatchGenerator(model, sampler=sampler, completion_batch_size=scenario.rows)
    arrivals: list[list[Arrival]] = [[] for _ in prompts]
    begun = now = time.perf_counter()
    row_of = {uid: row for row, uid in enumerate(generator.insert(prompts, max_tokens=[1 << 20] * scenario.rows))}
    num_unstarted, last = scenario.rows, 0
    while num_unstarted or len(arrivals[last]) < job.max_tokens:
        _, responses = generator.next()
        now = time.perf_counter()
        for response in responses:
            row = row_of[response.uid]
            if not arrivals[row]:
                num_unstarted, last = num_unstarted - 1, row
            arrivals[row].append((now, 1))
    generator.close()
    mx.synchronize()
    del generator
    mx.clear_cache()
    steps_s, num_tokens = steady_steps(arrivals, last=last, enough_at=now)
    return Round(
        ttft_s=tuple(row[0][0] - begun for row in arrivals),
        steps_s=tuple(steps_s),
        num_tokens=num_tokens,
        stats=Stats(memory=MemoryUse(peak=mx.get_peak_memory())),
        pages_used=None,
        num_preemptions=0,
    )


# ---- in the parent ----


def measure_in_child(job: Job) -> Figures | None:
    """Run a child; None, and its reason on standard error, if it failed."""
    print(f"{job.scenario}: {job.engine} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--child", msgspec.json.encode(job).decode()]
    environment = os.environ | blas.preload_environment()
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode != 0:
        print(f"{job.scenario}: {job.engine} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Figures)


def run_prototype(given: str) -> list[PrototypeLine]:
    """What the script prints; nothing if there is none."""
    script, *arguments = shlex.split(given)
    if not Path(script).exists():
        print(f"no prototype: {script} does not exist", file=sys.stderr)
        return []
    print("prototype ...", file=sys.stderr, flush=True)
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=PROTOTYPE_TIMEOUT_S)
    if done.returncode != 0:
        print(f"the prototype failed with exit code {done.returncode}", file=sys.stderr)
    return parse_prototype(done.stdout)


def parse_prototype(text: str) -> list[PrototypeLine]:
    """Its lines with a step time."""
    found = (PROTOTYPE_LINE.match(line) for line in text.splitlines())
    return [
        PrototypeLine(match[1], match[2], float(match[3]), float(match[4].replace(",", "")), float(match[5]))
        for match in found
        if match
    ]


def plain(scenario: str) -> str:
    """Without spaces."""
    return scenario.replace(" ", "").lower()


def print_tables(comparison: Comparison, scenarios: Sequence[str]) -> None:
    """Decode first, with ratios; then what came before it."""
    print(f"{'scenario':22} {'engine':26} {'step ms':>9} {'tok/s':>9} {'peak GB':>8}   ours is")
    for scenario in scenarios:
        ours = comparison.figures.get(scenario, {}).get("ours")
        for name, step_ms, tokens_per_s, peak_gb in comparison.lines_of(scenario):
            ratio = f"{ours.decode_tokens_per_s / tokens_per_s:.2f} x" if ours and name != "ours" else ""
            print(f"{scenario:22} {name:26} {step_ms:9.2f} {tokens_per_s:9.1f} {peak_gb:8.2f}   {ratio}")
    print(f"\n{'scenario':22} {'engine':26} {'p95 ms':>9} {'prefill/s':>9} {'TTFT p50':>8} {'p95 s':>7}")
    for scenario in scenarios:
        for name, f in comparison.figures.get(scenario, {}).items():
            first = f"{f.decode_step_p95_ms:9.2f} {f.prefill_tokens_per_s:9.0f}"
            print(f"{scenario:22} {name:26} {first} {f.ttft_p50_s:8.3f} {f.ttft_p95_s:7.3f}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Ours before `--`, the engine's behind it."""
    own, settings = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, settings = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--scenario", action="append", help=f"may be repeated; {', '.join(SCENARIOS)} without it")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which, and in which order")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prototype", metavar="PATH", help="a script, with its arguments")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(own)
    given.settings = settings
    return given


def main(argv: Sequence[str]) -> None:
    given = parse_arguments(argv)
    scenarios = given.scenario or list(SCENARIOS)
    comparison = Comparison(prototype=run_prototype(given.prototype) if given.prototype else [])
    for scenario in scenarios:
        for engine in given.engines.split(","):
            job = Job(
                engine=engine,
                folder=given.folder,
                scenario=scenario,
                max_tokens=given.max_tokens,
                warmup=given.warmup,
                repetitions=given.repetitions,
                seed=given.seed,
                temperature=given.temperature,
                settings=given.settings,
            )
            if (figures := measure_in_child(job)) is not None:
                comparison.figures.setdefault(scenario, {})[engine] = figures
                step_ms, tokens_per_s = figures.decode_step_ms, figures.decode_tokens_per_s
                print(f"{scenario}: {engine}: {step_ms:.2f} ms, {tokens_per_s:.1f} tok/s", file=sys.stderr, flush=True)
    print_tables(comparison, scenarios)
    if given.output is not None:
        results = {"figures": comparison.figures, "prototype": comparison.prototype}
        given.output.write_text(json.dumps(msgspec.to_builtins(results), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(msgspec.json.encode(run_child(msgspec.json.decode(sys.argv[2], type=Job))).decode())
    else:
        main(sys.argv[1:])
