"""Flags of `vllm-mlx bench` that are no settings of the engine."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_mlx.core.errors import ConfigError

MIN_TOKENS = 4
"""Fewer give no steps to measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured, and how it is told."""

    scenarios: tuple[str, ...]
    """As `engine.measure.parse_scenario` reads them."""
    max_tokens: int
    repetitions: int
    warmup: int
    seed: int
    temperature: float
    output: Path | None
    format: str

    @classmethod
    def of(cls, given: argparse.Namespace) -> BenchOptions:
        """From parsed arguments. Raises ConfigError where flags contradict each other."""
        if given.scenario and (given.num_prompts is not None or given.prompt_tokens is not None):
            raise ConfigError("--num-prompts and --prompt-tokens describe a scenario; --scenario is given too.")
        if given.output is not None and not given.output.parent.is_dir():
            raise ConfigError(f"--output: there is no folder {given.output.parent}")
        plain = f"{given.num_prompts or 10}x{given.prompt_tokens or 128}"
        return cls(
            scenarios=tuple(given.scenario or [plain]),
            max_tokens=given.num_tokens,
            repetitions=given.repetitions,
            warmup=given.warmup,
            seed=given.seed,
            temperature=given.temperature,
            output=given.output,
            format=given.format,
        )


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """Give the parser the flags that `BenchOptions.of` reads."""
    group = parser.add_argument_group("The measurement")
    group.add_argument(
        "--scenario",
        action="append",
        metavar="ROWSxTOKENS",
        help="Prompts that run together, such as 16x2048 or 1x16384+31x256; may be given several times.",
    )
    group.add_argument(
        "--num-prompts",
        type=_count(1),
        metavar="N",
        help="Without --scenario: prompts that run together. [10]",
    )
    group.add_argument(
        "--prompt-tokens", type=_count(1), metavar="N", help="Without --scenario: tokens of each prompt. [128]"
    )
    group.add_argument(
        "--max-tokens",
        type=_count(MIN_TOKENS),
        dest="num_tokens",
        default=64,
        metavar="N",
        help="Tokens that every sequence gets while all decode. [64]",
    )
    group.add_argument(
        "--repetitions", type=_count(1), default=3, metavar="N", help="Measured rounds of a scenario. [3]"
    )
    group.add_argument(
        "--warmup", type=_count(0), default=1, metavar="N", help="Rounds of a scenario before the measured ones. [1]"
    )
    group.add_argument("--seed", type=_count(0), default=0, metavar="N", help="Of the random prompts. [0]")
    group.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="X", help="0 takes the most likely token. [0]"
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="Write the results here too, as JSON.")
    group.add_argument(
        "--format",
        choices=("table", "json"),
        default="table",
        metavar="{table,json}",
        help="How results are printed. [table]",
    )


def _count(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return convert


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2")
    return value
