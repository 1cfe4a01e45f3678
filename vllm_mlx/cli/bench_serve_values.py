"""What the values of `bench-serve`'s flags may look like. Each function raises ValueError with the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def text(value: str) -> str:
    """Anything."""
    return value


def path(value: str) -> Path:
    """A file's name."""
    return Path(value).expanduser()


def url(value: str) -> str:
    """The base address of a server, without a slash or `/v1` at the end."""
    from vllm_mlx.bench.http import parse_origin

    parse_origin(value)
    return (value if "://" in value else f"http://{value}").rstrip("/").removesuffix("/v1")


def count(value: str) -> int:
    """1, 2, 3, ..."""
    return _whole(value, least=1)


def count_or_none(value: str) -> int:
    """0, 1, 2, ..."""
    return _whole(value, least=0)


def counts(value: str) -> tuple[int, ...]:
    """1,4,64"""
    return _listed(value, count)


def number(value: str) -> float:
    """A finite number, 0 or greater."""
    found = _number(value)
    if found < 0 or math.isinf(found):
        raise ValueError(f"{value!r} is not a number from 0 up")
    return found


def share(value: str) -> float:
    """0 to 1."""
    found = number(value)
    if found > 1:
        raise ValueError(f"{value!r} is not between 0 and 1")
    return found


def rates(value: str) -> tuple[float, ...]:
    """Requests per second, such as 2.5,inf"""
    return _listed(value, _rate)


def temperature(value: str) -> float | None:
    """A temperature, or `server` for the server's own."""
    return None if value == "server" else number(value)


def switch(value: str) -> bool:
    """true or false"""
    word = value.strip().lower()
    if word not in ("true", "false"):
        raise ValueError(f"{value!r} is neither true nor false")
    return word == "true"


def switches(value: str) -> tuple[bool, ...]:
    """true, false, or true,false"""
    return _listed(value, switch)


def words(value: str) -> tuple[str, ...]:
    """Names or paths with commas between."""
    return _listed(value, text)


def chosen(*choices: str) -> Callable[[str], str]:
    """A reader of one of some words; underscores stand for dashes."""

    def read(value: str) -> str:
        word = value.replace("_", "-")
        if word not in choices:
            raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
        return word

    return read


def several(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """A reader of some of some words."""
    return lambda value: _listed(value, chosen(*choices))


def mix(value: str) -> tuple[tuple[int, int], ...]:
    """COUNTxWORDS, such as 2x16384,30x100"""

    def part(piece: str) -> tuple[int, int]:
        number_of, _, length = piece.lower().partition("x")
        if not (number_of.isdigit() and length.isdigit() and int(number_of) and int(length)):
            raise ValueError(f"{piece!r} is not COUNTxWORDS, such as 30x100")
        return int(number_of), int(length)

    return _listed(value, part)


def objects(value: str) -> tuple[dict[str, Any], ...]:
    """JSON objects with commas between."""
    try:
        found = json.loads(f"[{value}]")
    except ValueError:
        raise ValueError(f"{value!r} is not one or more JSON objects with commas between") from None
    if not found or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{value!r} is not one or more JSON objects with commas between")
    return tuple(found)


def assignment(value: str) -> tuple[str, str]:
    """key=value"""
    key, equals, found = value.partition("=")
    if not (key and equals):
        raise ValueError(f"{value!r} is not key=value")
    return key, found


def _listed(value: str, read: Callable[[str], T]) -> tuple[T, ...]:
    pieces = [piece.strip() for piece in value.split(",") if piece.strip()]
    if not pieces:
        raise ValueError("needs at least one value")
    return tuple(map(read, pieces))


def _whole(value: str, *, least: int) -> int:
    try:
        found = int(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a whole number") from None
    if found < least:
        raise ValueError(f"{value!r} is less than {least}")
    return found


def _number(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None
    if math.isnan(found):
        raise ValueError(f"{value!r} is not a number")
    return found


def _rate(value: str) -> float:
    found = _number(value)
    if found <= 0:
        raise ValueError(f"{value!r} is not greater than 0 (or inf)")
    return found
