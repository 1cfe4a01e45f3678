"""A corpus of JSON schemas, and what makes an answer to one of them valid."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import msgspec

_FILE = Path(__file__).parent / "samples" / "schemas.jsonl"
_DURATION = r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
FORMATS = jsonschema.FormatChecker(("date", "email", "ipv4", "ipv6", "uuid"))


class Case(msgspec.Struct, frozen=True):
    """One line of the corpus."""

    name: str
    schema: Any
    refused: str | None = None
    """Path of the keyword that cannot be enforced."""


def cases() -> list[Case]:
    """All of them."""
    return [msgspec.convert(json.loads(line), Case) for line in _FILE.read_text(encoding="utf-8").splitlines()]


def check(case: Case, text: str) -> None:
    """Raise unless the text is JSON that the case's schema describes.

    Numbers are decimal, so that multiples of 0.01 are what they look like.
    """
    value = json.loads(text, parse_float=_number, parse_constant=_no_json)
    schema = json.loads(json.dumps(case.schema), parse_float=_number)
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)


def _number(text: str) -> decimal.Decimal | float:
    """Infinite, or nothing, where the exponent is larger than decimals can have."""
    try:
        return decimal.Decimal(text)
    except decimal.InvalidOperation:
        return float(text)


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(text: object) -> bool:
    if not isinstance(text, str):
        return True
    at = dt.datetime.fromisoformat(text.upper().replace(":60", ":59"))  # a leap second
    return at.tzinfo is not None


@FORMATS.checks("time", raises=ValueError)
def _is_time(text: object) -> bool:
    return not isinstance(text, str) or _is_date_time(f"2024-02-29T{text}")


@FORMATS.checks("duration")
def _is_duration(text: object) -> bool:
    return not isinstance(text, str) or re.fullmatch(_DURATION, text, re.ASCII) is not None


@FORMATS.checks("hostname")
def _is_hostname(text: object) -> bool:
    return not isinstance(text, str) or re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", text) is not None


@FORMATS.checks("uri", raises=ValueError)
def _is_uri(text: object) -> bool:
    return not isinstance(text, str) or bool(urlsplit(text).scheme)
