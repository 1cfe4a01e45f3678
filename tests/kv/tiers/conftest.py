"""Tiers over a temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_tier import MODEL, MakeTier, Tier, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make_tier(folder: Path) -> Iterator[MakeTier]:
    """Makes tiers that have looked through the folder, and closes them."""
    opened: list[Tier] = []

    def make(root: Path = folder, *, is_ready: bool = True, **settings: Any) -> Tier:
        defaults: dict[str, Any] = {
            "fingerprint": MODEL,
            "max_bytes": 1 << 30,
            "daily_write_bytes": None,
            "min_free_bytes": 0,
        }
        opened.append(Tier(root, **(defaults | settings)))
        if is_ready:
            wait_until(lambda: opened[-1].is_ready)
        return opened[-1]

    yield make
    for tier in opened:
        tier.close()
