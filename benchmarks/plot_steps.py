"""Time of a decode step against rows and context, as one SVG; and the measurements for it.

    python benchmarks/plot_steps.py --collect FOLDER --output steps.json [--rows 1,4,16,64] [--contexts 256,2048,16384]
        [--max-tokens 24] [-- --cache-memory-percent 0.8 ...]
    python benchmarks/plot_steps.py steps.json [more.json ...] --output steps.svg [--title TEXT]

`--collect` runs every combination through the engine, with the model in FOLDER, and writes the file anew after each, so
that what was measured is kept if it is interrupted; what the KV cache or the context cannot hold is left out and named.
What follows `--` are settings of the engine, spelled as for `vllm-mlx bench`.

Results of `vllm-mlx bench --output` and of `compare_engines.py --output` are read too: scenarios like 16x2048, whose
rows are all alike. Drawing needs matplotlib (`pip install matplotlib`), collecting MLX, mlx-lm, NumPy and msgspec.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError
from vllm_mlx.core.step import RunnerInfo
from vllm_mlx.engine.measure import Figures, check_scenario, measure, parse_scenario, summarise

ROWS = "1,2,4,8,16,32,64"
CONTEXTS = "256,1024,4096,16384"
STYLES = ("-", "--", ":", "-.")
"""Of the engines."""


class Point(NamedTuple):
    """A measured step, the mean of several."""

    engine: str
    rows: int
    context: int
    step_ms: float


# ---- measuring ----


async def collect(folder: Path, config: Config, scenarios: Sequence[str], *, max_tokens: int, output: Path) -> None:
    """Measure every scenario that fits, each once after the engine has seen it once."""
    from vllm_mlx.cli.compose import open_engine

    engine = open_engine(config, folder)
    try:
        info = await engine.start()
        print(f"{info.backend} ({info.device}), {info.dtype}", file=sys.stderr)
        results: list[Figures] = []
        for text in scenarios:
            scenario = parse_scenario(text)
            try:
                check_scenario(scenario, info, max_num_seqs=config.max_num_seqs, max_tokens=max_tokens)
            except ConfigError as error:
                print(f"left out: {error.message}", file=sys.stderr)
                continue
            one = await measure(engine, scenario, max_tokens=max_tokens, seed=text)
            results.append(summarise(scenario, [one]))
            print(f"{text}: {mean_step_ms(scenario.rows, results[-1].decode_tokens_per_s):.2f} ms", file=sys.stderr)
            write_report(output, info, results)
        if not results:
            raise SystemExit("nothing was measured: no combination fits the model and its KV cache")
    finally:
        await engine.stop()


def mean_step_ms(rows: int, tokens_per_s: float) -> float:
    """Not the median: tokens of short steps arrive in bunches, and then medians lie."""
    return 1000 * rows / tokens_per_s


def write_report(output: Path, info: RunnerInfo, results: Sequence[Figures]) -> None:
    """As `vllm-mlx bench` writes it, less the settings."""
    found = {
        "backend": info.backend,
        "device": info.device,
        "dtype": info.dtype,
        "results": msgspec.to_builtins(results),
    }
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def make_config(folder: Path, settings: Sequence[str]) -> Config:
    """The engine's settings, as on the command line. Without pyzmq it runs on a thread."""
    from vllm_mlx.cli.parser import find_command, parse
    from vllm_mlx.cli.settings import make_config

    given = {"engine_start_attempts": 1, **vars(parse(find_command("bench"), [str(folder), *settings]))}
    if importlib.util.find_spec("zmq") is None:
        given = {"engine": "thread", **given}
    return make_config(given, os.environ)


# ---- reading ----


def read_points(path: Path) -> tuple[list[Point], str]:
    """The steps in a file of results, and the device if it is named. Raises SystemExit if there are none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error
    points = list(_points(found)) if isinstance(found, dict) else []
    if not points:
        raise SystemExit(f"{path} holds no results of scenarios like 16x2048")
    return points, str(found.get("device", ""))


def _points(found: dict[str, Any]) -> Iterable[Point]:
    for figures in found.get("results", ()):
        yield from _point("vllm-mlx", figures)
    for engines in found.get("figures", {}).values():
        for engine, figures in engines.items():
            yield from _point("vllm-mlx" if engine == "ours" else engine, figures)


def _point(engine: str, figures: dict[str, Any]) -> Iterable[Point]:
    """Nothing for rows of unequal lengths."""
    lengths = parse_scenario(figures["scenario"]).lengths
    if len(set(lengths)) == 1:
        step_ms = mean_step_ms(len(lengths), figures["decode_tokens_per_s"])
        yield Point(engine, len(lengths), lengths[0], step_ms)


# ---- drawing ----


def draw(points: Sequence[Point], output: Path, *, title: str) -> None:
    """Two charts side by side: a line per context over rows, a line per number of rows over context."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib") from error
    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "vllm-mlx", "font.size": 9})
    figure, (over_rows, over_context) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    _lines(over_rows, points, x="rows", each="context", label="{:,} tokens")
    _lines(over_context, points, x="context", each="rows", label="{} rows")
    over_rows.set_ylabel("decode step, ms")
    figure.suptitle(title)
    figure.savefig(output, format="svg", metadata={"Date": None})
    plt.close(figure)


def _lines(axes: Any, points: Sequence[Point], *, x: str, each: str, label: str) -> None:
    from matplotlib.ticker import LogLocator

    engines = list(dict.fromkeys(point.engine for point in points))
    values = sorted({getattr(point, each) for point in points})
    for number, value in enumerate(values):
        for engine, style in zip(engines, itertools.cycle(STYLES), strict=False):
            chosen = [p for p in points if p.engine == engine and getattr(p, each) == value]
            line = sorted((getattr(p, x), p.step_ms) for p in chosen)
            text = label.format(value) + (f", {engine}" if len(engines) > 1 else "")
            if line:
                axes.plot(*zip(*line, strict=True), style, marker="o", ms=3, color=f"C{number}", label=text)
    axes.set(xscale="log", yscale="log", xlabel={"rows": "rows", "context": "tokens of context"}[x])
    ticks = sorted({getattr(point, x) for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


# ---- the command ----


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Ours before `--`, the engine's behind it."""
    own, settings = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, settings = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="JSON files to draw")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="measure the model in this folder")
    parser.add_argument("--rows", type=_numbers, default=ROWS, help=f"[{ROWS}]")
    parser.add_argument("--contexts", type=_numbers, default=CONTEXTS, help=f"[{CONTEXTS}]")
    parser.add_argument("--max-tokens", type=int, default=24, help="of each row, while all decode [24]")
    parser.add_argument("--output", type=Path, required=True, help="JSON with --collect, else SVG")
    parser.add_argument("--title", help="of the drawing; the device without it")
    given = parser.parse_args(own)
    given.settings = settings
    if bool(given.collect) == bool(given.results):
        parser.error("either --collect FOLDER or files of results")
    return given


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,4,16")
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str]) -> None:
    given = parse_arguments(argv)
    if given.collect:
        scenarios = [f"{rows}x{context}" for context in given.contexts for rows in given.rows]
        config = make_config(given.collect, given.settings)
        asyncio.run(collect(given.collect, config, scenarios, max_tokens=given.max_tokens, output=given.output))
        return
    files = [read_points(path) for path in given.results]
    devices = ", ".join(dict.fromkeys(device for _, device in files if device))
    title = given.title or f"Decode step{f' on {devices}' if devices else ''}"
    draw([point for points, _ in files for point in points], given.output, title=title)


if __name__ == "__main__":
    main(sys.argv[1:])
