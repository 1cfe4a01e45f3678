"""Commands set up logs as they begin; here each gives them back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from vllm_mlx.core.log import ROOT


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """The log of a command goes to a stream that is closed with its test."""
    logger = logging.getLogger(ROOT)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
