"""Formats: the same rows in each, and files that grow without losing anything."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.bench import output
from vllm_mlx.bench.report import Report
from vllm_mlx.core.errors import ConfigError

ROWS = [
    {"run_id": "123456789012", "tag": "it's \"x\"", "concurrency": 4, "ttft_ms": 1.5, "validated": True,
     "extra_body": {"a": 1}},
    {"run_id": "1e5", "tag": None, "concurrency": None, "ttft_ms": 20000.0, "validated": False, "extra_body": None},
]  # fmt: skip
FIELDS = ("run_id", "tag", "concurrency", "ttft_ms", "validated", "extra_body")
PLAIN = [("123456789012", 'it\'s "x"', 4, 1.5, 1, '{"a": 1}'), ("1e5", None, None, 20000.0, 0, None)]


def report(rows: list[dict[str, Any]] = ROWS, fields: tuple[str, ...] = FIELDS) -> Report:
    document = {"kind": "x", "summary": [], "rows": rows, "complete": True}
    return Report(document=document, table="t", fields=fields, rows=rows, shown=rows, shown_fields=fields)


def written(chosen: str) -> str:
    text = io.StringIO()
    output.write(report(), chosen, None, stdout=text)
    return text.getvalue()


def test_json_is_the_document() -> None:
    assert json.loads(written("json"))["rows"] == ROWS


def test_csv_has_a_head_and_a_line_for_each_row() -> None:
    head, *lines = csv.reader(io.StringIO(written("csv")))
    assert tuple(head) == FIELDS
    assert lines[0] == ["123456789012", 'it\'s "x"', "4", "1.5", "True", '{"a": 1}']
    assert lines[1] == ["1e5", "", "", "20000.0", "False", ""]


def test_sql_text_makes_the_same_table_as_the_database(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    output.write(report(), "sqlite", path, stdout=io.StringIO())
    with closing(sqlite3.connect(":memory:")) as memory, closing(sqlite3.connect(path)) as file:
        memory.executescript(written("sql"))
        for database in (memory, file):
            assert database.execute("SELECT * FROM t").fetchall() == PLAIN


def test_sqlite_appends_and_learns_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    output.append_sqlite(report(), path)
    more = [{"run_id": "2", "rack": "7", 'odd"name': 1}]
    output.append_sqlite(report(more, ("run_id", "rack", 'odd"name')), path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT run_id, rack, ttft_ms FROM t").fetchall() == [
            ("123456789012", None, 1.5),
            ("1e5", None, 20000),
            ("2", 7, None),
        ]


def test_table_shows_every_row_and_no_markup() -> None:
    rows = [{"case_id": "[red]x[/]", "ttft_ms": 0.1234, "ok": None, "reasons": ["a", "b"]}]
    text = io.StringIO()
    output.write_table(report(rows, ("case_id", "ttft_ms", "ok", "reasons")), text)
    head, line = text.getvalue().splitlines()
    assert head.split() == ["case_id", "ttft_ms", "ok", "reasons"]
    assert line.split() == ["[red]x[/]", "0.123", "-", "a;", "b"]


@pytest.mark.parametrize(
    ("wanted", "name", "chosen"),
    [
        ("auto", None, "table"), ("auto", "x.JSON", "json"), ("auto", "x.db", "sqlite"), ("auto", "x.txt", "table"),
        ("csv", "x.json", "csv"),
    ],
)  # fmt: skip
def test_format_follows_the_flag_then_the_name(wanted: str, name: str | None, chosen: str) -> None:
    assert output.choose_format(wanted, Path(name) if name else None, default="table") == chosen


def test_output_that_cannot_be_written_is_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    for path, chosen, words in (
        (tmp_path / "none" / "x.json", "json", r"--output: .* cannot be written: No such file"),
        (tmp_path, "csv", r"--output: .* cannot be written: Is a directory"),
        (tmp_path / "text.db", "sqlite", r"--output: .* cannot be used as an SQLite database"),
        (tmp_path / "none" / "x.db", "sqlite", r"--output: .* cannot be used as an SQLite database"),
        (None, "sqlite", r"--format sqlite: needs --output"),
    ):
        with pytest.raises(ConfigError, match=words):
            output.check_output(path, chosen)
    output.check_output(None, "json")
    output.check_output(tmp_path / "x.db", "sqlite")


def test_checking_a_file_leaves_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("kept")
    output.check_output(tmp_path / "x.json", "json")
    assert (tmp_path / "x.json").read_text() == "kept"


class Terminal(io.StringIO):
    """A narrow one."""

    def isatty(self) -> bool:
        return True


def plain(text: io.StringIO) -> list[str]:
    """Lines without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).splitlines()


def test_narrow_terminal_gets_a_column_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    fields = tuple(f"figure_{i}" for i in range(8))
    rows = [dict.fromkeys(fields, 1000 * number) for number in (1, 2, 3, 4, 5)]
    text = Terminal()
    output.write_table(report(rows, fields), text)
    lines = [line.split() for line in plain(text)]
    assert lines[0] == ["figure_0", "1000", "2000", "3000", "4000", "5000"]
    assert len(lines) == 8
    monkeypatch.setenv("COLUMNS", "22")
    text = Terminal()
    output.write_table(report(rows, fields), text)
    assert [line.split() for line in plain(text)][8] == ["figure_0", "3000", "4000"]
