"""The formats: a table for people, JSON, CSV, SQL text, and rows appended to an SQLite file."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mlx.bench.report import Report, notes
from vllm_mlx.bench.rows import Row
from vllm_mlx.core.errors import ConfigError

FORMATS = ("auto", "table", "json", "csv", "sql", "sqlite")
_SUFFIXES = ((".json", "json"), (".csv", "csv"), (".sql", "sql"), (".sqlite", "sqlite"), (".db", "sqlite"))
_TEXT = frozenset(
    (
        *("run_id", "timestamp", "tag", "tags", "chip", "os_version", "model_id", "model_type", "engine_type"),
        *("kv_quant", "cache_type", "backend", "dtype", "server_version", "prompt_set", "extra_body", "endpoint"),
        *("failure_kinds", "finish_reasons", "tokens_counted_by", "metrics_delta", "workload", "case_id"),
        *("request_rate", "request_extra_body", "quality_issues", "finish_reason", "content_preview"),
        *("cache_mode", "verdict", "reasons"),
    )
)
"""Columns that hold text; all others hold numbers."""
_WIDE = 220


def choose_format(wanted: str, output: Path | None, *, default: str) -> str:
    """'auto' is what the file's name ends in, else the default of the kind of run."""
    if wanted != "auto":
        return wanted
    named = dict(_SUFFIXES).get(output.suffix.lower()) if output else None
    return named or default


def check_output(output: Path | None, chosen: str) -> None:
    """Find out before an hour of measuring whether results can be written. Raises ConfigError."""
    if output is None:
        if chosen == "sqlite":
            raise ConfigError("--format sqlite: needs --output FILE")
        return
    try:
        if chosen == "sqlite":
            with closing(sqlite3.connect(output)) as database:
                database.execute("SELECT name FROM sqlite_master").fetchall()
        else:
            with output.open("a", encoding="utf-8"):
                pass
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror}") from None
    except sqlite3.Error as error:
        raise ConfigError(f"--output: {output} cannot be used as an SQLite database: {error}") from None


def write(report: Report, chosen: str, output: Path | None, *, stdout: TextIO) -> None:
    """Write a report in a format; to standard output where there is no file. Raises OSError or sqlite3.Error."""
    if chosen == "sqlite":
        assert output is not None
        append_sqlite(report, output)
    elif output is None:
        _write_text(report, chosen, stdout)
    else:
        with output.open("w", encoding="utf-8", newline="") as file:
            _write_text(report, chosen, file)


def _write_text(report: Report, chosen: str, file: TextIO) -> None:
    match chosen:
        case "table":
            write_table(report, file)
        case "json":
            file.write(json.dumps(report.document, indent=2, ensure_ascii=False, default=str) + "\n")
        case "csv":
            file.write(csv_text(report))
        case "sql":
            file.write(sql_text(report))


def write_table(report: Report, file: TextIO) -> None:
    """Lines for people."""
    console = Console(file=file, width=None if file.isatty() else _WIDE)
    lines = [list(report.shown_fields)]
    lines += [[_shown(row.get(name)) for name in report.shown_fields] for row in report.shown]
    for part in _fitting(lines, console.width):
        console.print(_table(part))
    for line in notes(report.document):
        console.print(line, markup=False, highlight=False)


def _fitting(lines: list[list[str]], width: int) -> Iterator[list[list[str]]]:
    """The lines as they are if they fit. Else fields become lines, and rows columns: as many side by side as fit."""
    if _width(lines) <= width:
        yield lines
        return
    head, *rows = lines
    group: list[list[str]] = []
    for row in rows:
        if group and _width(_turned([head, *group, row])) > width:
            yield _turned([head, *group])
            group = []
        group.append(row)
    if group:
        yield _turned([head, *group])


def _turned(lines: list[list[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*lines, strict=True)]


def _width(lines: list[list[str]]) -> int:
    """Characters, with two between columns."""
    return sum(max(map(len, column)) + 2 for column in _turned(lines)) - 2


def _table(lines: list[list[str]]) -> Table:
    """The first line is the head. Figures stand to the right."""
    head, *rows = lines
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(head):
        table.add_column(Text(title), justify="left" if number == 0 or title in _TEXT else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def csv_text(report: Report) -> str:
    """A head line, and one line a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(report.fields)
    writer.writerows(_plain(report.rows, report.fields))
    return text.getvalue()


def sql_text(report: Report) -> str:
    """A table and its rows, as statements that SQLite and PostgreSQL read."""
    lines = [f"{_create(report)};"]
    head = f"INSERT INTO {report.table} ({_names(report.fields)}) VALUES"
    lines += [f"{head} ({', '.join(map(_literal, row))});" for row in _plain(report.rows, report.fields)]
    return "\n".join(lines) + "\n"


def append_sqlite(report: Report, path: Path) -> None:
    """Add the rows to the table in the file; both are made if need be. All rows are added, or none."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(_create(report))
        present = {column[1] for column in database.execute(f"PRAGMA table_info({report.table})")}
        for name in report.fields:
            if name not in present:
                database.execute(f"ALTER TABLE {report.table} ADD COLUMN {_column(name)}")
        marks = ", ".join("?" for _ in report.fields)
        statement = f"INSERT INTO {report.table} ({_names(report.fields)}) VALUES ({marks})"
        database.executemany(statement, _plain(report.rows, report.fields))


def _plain(rows: Sequence[Row], fields: Sequence[str]) -> list[tuple[Any, ...]]:
    """Values of the columns; lists and objects as JSON."""
    return [tuple(_value(row.get(name)) for name in fields) for row in rows]


def _value(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else value


def _create(report: Report) -> str:
    return f"CREATE TABLE IF NOT EXISTS {report.table} ({', '.join(map(_column, report.fields))})"


def _column(name: str) -> str:
    return f"{_names([name])} {'TEXT' if name in _TEXT else 'NUMERIC'}"


def _names(fields: Sequence[str]) -> str:
    return ", ".join('"' + name.replace('"', '""') + '"' for name in fields)


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"


def _shown(value: Any) -> str:
    """Figures with the digits that mean something."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"
        case list():
            return "; ".join(map(str, value))
        case dict():
            return json.dumps(value, ensure_ascii=False)
    return str(value)
