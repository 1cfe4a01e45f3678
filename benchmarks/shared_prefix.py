"""Many requests that share a long prefix: memory by their suffixes only, and the first token as soon as for one alone.

    python benchmarks/shared_prefix.py FOLDER [--prefix 8000] [--suffix 100] [--rows 64] [--max-tokens 16]
        [--rounds 3] [--output results.json] [-- --cache-memory-mb 20000 ...]

One request that computes the prefix is timed, then one that finds it, many at once that find it, and many at once that
begin with another prefix, which one of them computes while the others wait for it. Each has a suffix of its own. What
follows `--` are settings of the engine, spelled as for `vllm-mlx bench`. Needs MLX, mlx-lm, NumPy and msgspec.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mlx.cli.compose import open_engine
from vllm_mlx.cli.parser import find_command, parse
from vllm_mlx.cli.settings import make_config
from vllm_mlx.core.messages import EngineClient, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams

STATS_S = 0.5
"""Until the engine has surely told how many pages it uses."""


async def first_token_s(engine: EngineClient, name: str, prompt: tuple[int, ...], max_tokens: int) -> tuple[float, int]:
    """Seconds to the first token of a request, which is run to its end, and how many tokens it found."""
    begun, first, num_cached = time.perf_counter(), 0.0, 0
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
    async for output in engine.generate(Submit(name, Prompt(prompt), sampling)):
        num_cached = max(num_cached, output.num_cached)
        if output.token_ids and not first:
            first = time.perf_counter() - begun
    return first, num_cached


async def measure(engine: EngineClient, given: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Medians of rounds behind a first one, which compiles what there is to compile."""
    names = [f"round {number}" for number in range(1 + given.rounds)]
    _, *rounds = [await measure_round(engine, given, vocab_size, name=name) for name in names]
    for found in rounds:
        print(" ".join(f"{value:.4g}" for value in found.values()), file=sys.stderr, flush=True)
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


async def measure_round(
    engine: EngineClient, given: argparse.Namespace, vocab_size: int, *, name: str
) -> dict[str, Any]:
    """With one prefix: a request that computes it, one that finds it, and many; with another: many at once."""
    draw = random.Random(f"{given.seed} {name}")

    def prompts(prefix: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
        return [(*prefix, *(draw.randrange(3, vocab_size) for _ in range(given.suffix))) for _ in range(count)]

    known, fresh = (tuple(draw.randrange(3, vocab_size) for _ in range(given.prefix)) for _ in range(2))
    [cold], [alone] = prompts(known, 1), prompts(known, 1)
    cold_s, _ = await first_token_s(engine, f"{name} cold", cold, given.max_tokens)
    alone_s, _ = await first_token_s(engine, f"{name} alone", alone, given.max_tokens)
    found = await measure_many(engine, prompts(known, given.rows), given.max_tokens, name=f"{name} found")
    await engine.forget_cache()
    fresh_found = await measure_many(engine, prompts(fresh, given.rows), given.max_tokens, name=f"{name} fresh")
    return {
        "one, prefix computed: TTFT s": cold_s,
        "one, prefix found: TTFT s": alone_s,
        **{f"many, prefix found: {key}": value for key, value in found.items()},
        **{f"many, prefix computed: {key}": value for key, value in fresh_found.items()},
        "pages of the prefix": given.prefix // 32,
        "pages of all suffixes": given.rows * -(-(given.suffix + given.max_tokens + given.prefix % 32) // 32),
        "p95 of many / one, prefix found": found["TTFT p95 s"] / alone_s,
        "p95 of many / one, prefix computed": fresh_found["TTFT p95 s"] / cold_s,
    }


async def measure_many(
    engine: EngineClient, prompts: Sequence[tuple[int, ...]], max_tokens: int, *, name: str
) -> dict[str, Any]:
    """All at once."""
    runs = [
        asyncio.create_task(first_token_s(engine, f"{name} {i}", prompt, max_tokens))
        for i, prompt in enumerate(prompts)
    ]
    peak_pages = 0
    while not all(run.done() for run in runs):
        await asyncio.sleep(0.02)
        peak_pages = max(peak_pages, engine.status().stats.pages_used)
    done = [run.result() for run in runs]
    await asyncio.sleep(STATS_S)
    first = sorted(seconds for seconds, _ in done)
    return {
        "TTFT p50 s": first[len(first) // 2],
        "TTFT p95 s": first[int(0.95 * (len(first) - 1))],
        "least found tokens": sorted(num_cached for _, num_cached in done)[1],
        "peak pages": peak_pages,
    }


async def run(given: argparse.Namespace) -> dict[str, Any]:
    """Through the same client and engine as the server's."""
    settings = vars(parse(find_command("bench"), [given.folder, *given.settings]))
    settings = {"engine_start_attempts": 1, "max_num_seqs": given.rows, **settings}
    if importlib.util.find_spec("zmq") is None:
        settings = {"engine": "thread", **settings}
    engine = open_engine(make_config(settings, os.environ), Path(given.folder))
    try:
        info = await engine.start()
        return {"device": info.device, "dtype": info.dtype, **await measure(engine, given, info.vocab_size)}
    finally:
        await engine.stop()


def main(argv: Sequence[str]) -> None:
    own, settings = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prefix", type=int, default=8000)
    parser.add_argument("--suffix", type=int, default=100)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(own)
    given.settings = list(settings)
    found = asyncio.run(run(given))
    for name, value in found.items():
        print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
