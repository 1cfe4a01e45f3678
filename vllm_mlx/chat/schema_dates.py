"""Dates that exist: llguidance's formats also let through 29 February of every year, the year 0 and leap seconds.

No calendar of Python, and so few readers of an answer, take these. A pattern beside the format rules them out; as both
keywords speak of strings alone, it means the same to any schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vllm_mlx.chat.schema_paths import MAPS, VALUES

_YEAR = r"([0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_FOURS = r"(0[48]|[2468][048]|[13579][26])"
_DATE = (
    rf"({_YEAR}-(0[13-9]|1[0-2])-[0-9]{{2}}|{_YEAR}-02-([01][0-9]|2[0-8])"
    rf"|([0-9]{{2}}{_FOURS}|{_FOURS}00)-02-29)"
)
_TIME = r"[0-9]{2}:[0-9]{2}:[0-5]"
_PATTERNS: Mapping[str, str] = MappingProxyType(
    {"date": f"^{_DATE}$", "date-time": f"^{_DATE}[^0-9]{_TIME}", "time": f"^{_TIME}"}
)


def with_real_dates(schema: Any) -> Any:
    """A copy of a schema whose formats `date`, `time` and `date-time` are narrowed by patterns."""
    if isinstance(schema, list):
        return [with_real_dates(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _kept(key, value) for key, value in schema.items()}
    name = found.get("format")
    if not isinstance(name, str) or name not in _PATTERNS:
        return found
    if "pattern" not in found:
        return {**found, "pattern": _PATTERNS[name]}
    others = found.get("allOf", [])
    return {**found, "allOf": [*others, {"pattern": _PATTERNS[name]}]} if isinstance(others, list) else found


def _kept(key: str, value: Any) -> Any:
    if key in VALUES:
        return value
    if key in MAPS and isinstance(value, dict):
        return {name: with_real_dates(one) for name, one in value.items()}
    return with_real_dates(value)
