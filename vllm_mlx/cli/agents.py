"""`vllm-mlx agents check`: a coding agent's conversation in every dialect, against a running server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from vllm_mlx.cli.client import Target
from vllm_mlx.cli.parser import Parser, parse_strictly
from vllm_mlx.cli.settings import ENV_PREFIX
from vllm_mlx.cli.target import NoServer, base_url, find_target
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError

if TYPE_CHECKING:
    from vllm_mlx.bench.agents.check import TurnReport

DIALECT_NAMES = ("chat", "responses", "messages")
_HEAD = ("dialect", "turn", "expected", "called", "prompt", "cached", "first token", "")
_MAX_SHOWN = 40


def agents(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0, or 1 if anything was wrong.

    Raises:
        ConfigError: a flag is wrong, or there is no server.
    """
    if arguments and arguments[0] not in ("check", "-h", "--help"):
        raise ConfigError(f"agents: unknown command {arguments[0]!r} (check)")
    try:
        given = parse_strictly(agents_parser(), arguments)
    except SystemExit as exit_:  # argparse leaves this way after printing --help
        return int(exit_.code or 0)
    key = given.api_key or os.environ.get(f"{ENV_PREFIX}API_KEY") or None
    try:
        target = find_target(base_url(given.url), key=key)
    except NoServer as error:
        raise ConfigError(f"{error}; start a server first: vllm-mlx serve MODEL") from None
    if given.model is not None:
        target = msgspec.structs.replace(target, model=given.model)
    names = given.dialect or DIALECT_NAMES
    reports = asyncio.run(_check(target, names, timeout_s=given.timeout, is_quick=given.quick))
    if given.format == "json":
        print(msgspec.json.format(msgspec.json.encode(reports), indent=2).decode())
    else:
        print(f"{target.model} at {target.url}\n\n{table(reports)}")
    return int(any(report.problems for report in reports))


def agents_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = Parser(
        prog="vllm-mlx agents",
        description="Replay a coding agent's conversation against a running server, and judge every turn.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        usage="vllm-mlx agents check [flags]",
    )
    parser.add_argument("action", metavar="check", choices=("check",), help="The one thing that can be done.")
    group = parser.add_argument_group("The check")
    default = Config()
    url = f"http://{default.host}:{default.port}"
    group.add_argument("--url", default=url, metavar="URL", help=f"Address of the server. [{url}]")
    group.add_argument("--api-key", metavar="KEY", help="Its key; VLLM_MLX_API_KEY if not given.")
    group.add_argument("--model", metavar="NAME", help="The model; the first that the server lists if not given.")
    names = ", ".join(DIALECT_NAMES)
    group.add_argument(
        "--dialect",
        action="append",
        choices=DIALECT_NAMES,
        metavar="NAME",
        help=f"Only this one of {names}; may be given several times.",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help="A system prompt of some 200 tokens instead of 2,000: for machines without a GPU.",
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="Longest silence of the server. [600]"
    )
    group.add_argument(
        "--format", choices=("table", "json"), default="table", metavar="{table,json}", help="Of the report. [table]"
    )
    return parser


def table(reports: Sequence[TurnReport]) -> str:
    """One line a turn, and what is wrong below it."""
    rows = [_HEAD, *(_row(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [_line(_HEAD, widths)]
    for report, row in zip(reports, rows[1:], strict=True):
        lines += [_line(row, widths), *(f"    {problem}" for problem in report.problems)]
    num_wrong = sum(bool(report.problems) for report in reports)
    return "\n".join([*lines, "", f"{num_wrong} of {len(reports)} turns went wrong" if num_wrong else "all is well"])


async def _check(target: Target, names: Sequence[str], *, timeout_s: float, is_quick: bool) -> list[TurnReport]:
    """All reports; each turn is told when it is over."""
    from vllm_mlx.bench.agents.check import DIALECTS, check_dialect
    from vllm_mlx.bench.agents.conversation import NUM_QUICK_RULES, NUM_RULES
    from vllm_mlx.bench.http import HttpClient, parse_origin

    http = HttpClient(parse_origin(target.url), api_key=target.key, timeout_s=timeout_s)
    reports: list[TurnReport] = []
    for dialect in DIALECTS:
        if dialect.name not in names:
            continue
        print(f"vllm-mlx: {dialect.path}", file=sys.stderr)
        session, num_rules = uuid.uuid4().hex, NUM_QUICK_RULES if is_quick else NUM_RULES
        async for report in check_dialect(http, dialect, model=target.model, session=session, num_rules=num_rules):
            print(_progress(report), file=sys.stderr, flush=True)
            reports.append(report)
    return reports


def _progress(report: TurnReport) -> str:
    state = "; ".join(report.problems) or "ok"
    return f"vllm-mlx: {report.dialect}, turn {report.number}: {report.total_ms / 1000:,.1f} s, {state}"


def _row(report: TurnReport) -> tuple[str, ...]:
    called = " ".join("; ".join(report.called).split())
    return (
        report.dialect,
        str(report.number),
        report.expected,
        called if len(called) <= _MAX_SHOWN else f"{called[: _MAX_SHOWN - 3]}...",
        "?" if report.num_prompt is None else f"{report.num_prompt:,}",
        "?" if report.num_cached is None else f"{report.num_cached:,}",
        "" if report.ttft_ms is None else f"{report.ttft_ms:,.0f} ms",
        "WRONG" if report.problems else "ok",
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
