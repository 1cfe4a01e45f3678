"""What the machine offers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mlx.runner import device


def test_a_container_s_limit_counts_as_the_machine_s_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "CONTAINER_LIMITS", (limit, tmp_path / "missing"))
    physical = device.machine_memory_bytes()
    limit.write_text("max\n")
    assert device.machine_memory_bytes() == physical
    limit.write_text(f"{1 << 30}\n")
    assert device.machine_memory_bytes() == 1 << 30


def test_the_device_names_itself() -> None:
    found = device.probe()
    assert found.backend in ("metal", "cuda", "cpu")
    assert found.name
    assert found.memory_bytes > 1 << 28
