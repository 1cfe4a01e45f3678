"""`vllm-mlx bench-serve`: measures a running server; `bench-serve compare A.json B.json`: two results side by side."""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mlx.cli.bench_serve_flags import FLAGS, GROUPS, Flag
from vllm_mlx.cli.parser import Parser, parse_strictly

if TYPE_CHECKING:
    from vllm_mlx.bench.report import Report

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
EPILOG = "`vllm-mlx bench-serve compare A.json B.json` shows two JSON results side by side."


def bench_serve(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0, 1 (no server, no answer, or a check failed) or 130 (Ctrl-C).

    Raises:
        ConfigError: a flag or a file is wrong.
    """
    try:
        if arguments and arguments[0] == "compare":
            return _compare(parse_strictly(compare_parser(), arguments[1:]))
        return _measure(parse_strictly(bench_serve_parser(), arguments))
    except SystemExit as exit_:  # argparse leaves this way after printing --help
        return int(exit_.code or 0)


def bench_serve_parser() -> argparse.ArgumentParser:
    """The parser of the command; values that are not given are absent."""
    parser = _parser("vllm-mlx bench-serve", "Measure a running server over HTTP.", EPILOG)
    sections = {group: parser.add_argument_group(title) for group, title in GROUPS.items()}
    for flag in FLAGS:
        sections[flag.group].add_argument(flag.name, **_options(flag))
    return parser


def compare_parser() -> argparse.ArgumentParser:
    """The parser of `bench-serve compare`."""
    parser = _parser("vllm-mlx bench-serve compare", "Show how B differs from A.", None)
    parser.add_argument("before", metavar="A.json", type=Path, help="A result of bench-serve --format json.")
    parser.add_argument("after", metavar="B.json", type=Path, help="Another one.")
    return parser


def _parser(program: str, summary: str, epilog: str | None) -> Parser:
    return Parser(
        prog=program,
        description=summary,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        usage=None if epilog is None else f"{program} [flags]",
    )


def _options(flag: Flag) -> dict[str, Any]:
    """What argparse needs to know."""
    shown = flag.default_text
    text = f"{flag.text} [{shown}]" if shown else flag.text
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if flag.read is None:
        return options | {"action": "store_true"}
    options |= {"type": _reader(flag.read), "metavar": flag.metavar}
    if flag.name == "--override-field":
        return options | {"action": "extend", "nargs": "*"}
    return options | {"action": "append" if flag.is_repeatable else "store"}


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader whose reason reaches the person."""

    def checked(value: str) -> Any:
        try:
            return read(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _measure(namespace: argparse.Namespace) -> int:
    from vllm_mlx.bench import output
    from vllm_mlx.bench.run import execute
    from vllm_mlx.bench.server import ServerUnusable
    from vllm_mlx.cli.bench_serve_plan import Given, read_plan, read_run
    from vllm_mlx.cli.bench_serve_progress import BenchProgress

    given = Given(namespace)
    options, plan = read_run(given, os.environ), read_plan(given)
    chosen = output.choose_format(options.format, options.output, default=plan.default_format)
    output.check_output(options.output, chosen)
    for line in given.notices():
        print(f"vllm-mlx: note: {line}", file=sys.stderr)
    try:
        with BenchProgress(sys.stderr) as progress:
            outcome = execute(options, plan, progress=progress)
    except ServerUnusable as error:
        return _fail(error.message)
    if outcome.report is not None and not _written(outcome.report, chosen, options.output):
        return EXIT_FAILURE
    if outcome.is_interrupted:
        return EXIT_INTERRUPTED
    return 0 if plan.has_succeeded() else EXIT_FAILURE


def _written(report: Report, chosen: str, path: Path | None) -> bool:
    """Whether results are where they shall be; if they cannot be written there, they are printed."""
    from vllm_mlx.bench import output

    try:
        output.write(report, chosen, path, stdout=sys.stdout)
    except (OSError, sqlite3.Error) as error:
        if path is None:
            raise
        _fail(f"--output: {path} cannot be written: {error}; the results follow as JSON")
        output.write(report, "json", None, stdout=sys.stdout)
        return False
    if path is not None:
        output.write(report, "table", None, stdout=sys.stdout)
        print(f"results: {path}", file=sys.stderr)
    return True


def _compare(namespace: argparse.Namespace) -> int:
    from vllm_mlx.bench import compare

    found = compare.compare(compare.load(namespace.before), compare.load(namespace.after))
    compare.write(found, sys.stdout)
    return 0


def _fail(message: str) -> int:
    print(f"vllm-mlx: error: {message}", file=sys.stderr)
    return EXIT_FAILURE
