"""Lines of the log."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from vllm_mlx.core import log


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the log says; the logger is given back as it was."""
    logger = logging.getLogger(log.ROOT)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    log.setup()
    [handler] = logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(found := io.StringIO())
    yield found
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def test_value_from_a_client_stays_on_its_line(lines: io.StringIO) -> None:
    log.get_logger("request").info("POST", extra=log.fields(param="a\n12:00:00 INFO fake", other="é"))
    assert lines.getvalue().count("\n") == 1
    assert "other=é" in lines.getvalue()


def test_endless_value_is_cut(lines: io.StringIO) -> None:
    log.get_logger("request").info("POST", extra=log.fields(param="x" * 1_000_000))
    assert len(lines.getvalue()) < 1000
