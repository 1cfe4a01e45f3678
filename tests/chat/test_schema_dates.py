"""Formats of time: only what a calendar has, and all of that."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest
from fixtures_text import write_tokenizer

from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.schema_dates import with_real_dates
from vllm_mlx.chat.shapes import schema_entry
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.grammar import GrammarError

DAYS = [dt.date(year, month, 28) for year in (1, 99, 400, 1900, 2000, 2023, 2024, 2100, 9999) for month in (1, 2, 4)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> TokenGrammars:
    return TokenGrammars(tokenizer, vocab_size=640)


def fits(grammars: TokenGrammars, tokenizer: Tokenizer, schema: Any, text: str) -> bool:
    entry = schema_entry(schema, is_strict=True, param="schema")
    matcher = grammars.matcher(json.dumps({"grammars": [entry]}))
    try:
        matcher.advance(tokenizer.encode(json.dumps(text), add_special_tokens=False))
    except GrammarError:
        return False
    return bool(matcher.inner.is_accepting())


def exists(text: str) -> bool:
    try:
        dt.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def test_dates_are_those_of_the_calendar(grammars: TokenGrammars, tokenizer: Tokenizer) -> None:
    texts = [f"{first.isoformat()[:8]}{day:02}" for first in DAYS for day in (0, 1, 28, 29, 30, 31, 32)]
    texts += ["0000-01-01", "2023-13-01", "2023-00-01"]
    schema = {"type": "string", "format": "date"}
    assert {text: fits(grammars, tokenizer, schema, text) for text in texts} == {text: exists(text) for text in texts}


@pytest.mark.parametrize(
    ("name", "text", "fitting"),
    [
        ("date-time", "2024-02-29T23:59:59Z", True),
        ("date-time", "2024-12-31T00:00:00.25+02:00", True),
        ("date-time", "2023-02-29T00:00:00Z", False),
        ("date-time", "2016-12-31T23:59:60Z", False),
        ("time", "23:59:59Z", True),
        ("time", "23:59:60Z", False),
    ],
)
def test_times_are_those_of_the_clock(
    grammars: TokenGrammars, tokenizer: Tokenizer, name: str, text: str, fitting: bool
) -> None:
    assert fits(grammars, tokenizer, {"type": "string", "format": name}, text) is fitting


def test_a_pattern_beside_the_format_holds_too(grammars: TokenGrammars, tokenizer: Tokenizer) -> None:
    schema = {"type": "string", "format": "date", "pattern": "^20"}
    found = [fits(grammars, tokenizer, schema, text) for text in ("2024-02-29", "2023-02-29", "1999-01-01")]
    assert found == [True, False, False]


def test_names_and_values_that_look_like_formats_are_left_alone() -> None:
    schema = {"properties": {"format": {"const": {"format": "date"}}}, "enum": [{"format": "date"}], "format": "email"}
    assert with_real_dates(schema) == schema
