"""Fixtures of every suite."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """`@pytest.mark.anyio` runs on asyncio, the loop that the server uses."""
    return "asyncio"
