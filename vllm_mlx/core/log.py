"""Logs: one line a request, for a person or as JSON. Prompts are never logged."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

ROOT = "vllm_mlx"
_CHATTY = ("pypdf",)
"""Libraries that complain to whoever listens about what clients send."""
_MAX_VALUE = 200
"""Characters of a field that a person is shown."""


class _TextFormatter(logging.Formatter):
    """`12:30:01 INFO  engine  message  key=value ...`"""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix(f"{ROOT}.")
        fields = "".join(f"  {key}={_one_word(value)}" for key, value in _fields(record).items())
        line = f"{clock} {record.levelname:<7} {name}  {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _one_word(value: Any) -> str:
    """A value that neither ends its line nor fills the log: names of fields come from clients."""
    text = str(value)
    shown = text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode()


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def setup(level: str = "info", fmt: str = "text") -> None:
    """Send the package's logs to standard error. `fmt` is 'text' or 'json'."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if fmt == "json" else _TextFormatter())
    root = logging.getLogger(ROOT)
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
    for name in _CHATTY:
        logging.getLogger(name).addHandler(logging.NullHandler())


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` without the package, such as 'engine'."""
    return logging.getLogger(f"{ROOT}.{name}")


def fields(**values: Any) -> dict[str, Any]:
    """Structured values of a log line: `log.info("done", extra=fields(id=..., tokens=...))`."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found = getattr(record, "fields", {})
    return found if isinstance(found, dict) else {}
