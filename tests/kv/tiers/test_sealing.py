"""Keys and sealing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vllm_mlx.core.errors import ConfigError
from vllm_mlx.kv.tiers.sealing import Sealer, read_key

KEY = bytes(range(32))


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), b" " + KEY.hex().upper().encode() + b"\n"])
def test_key_is_raw_or_hexadecimal(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    assert read_key(file) == KEY


@pytest.mark.parametrize("content", [b"", b"short", KEY + b"x", b"g" * 64, KEY.hex().encode() + b"00", b"0" * 10_000])
def test_other_key_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--ssd-cache-key-file: .* 32 bytes or 64 hexadecimal"):
        read_key(file)


def test_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent cannot be read: No such file"):
        read_key(tmp_path / "absent")


def test_header_is_sealed_with_the_payload() -> None:
    sealer = Sealer(KEY)
    stored = sealer.seal(b"payload", nonce=b"n" * 12, header=b"header")
    assert sealer.open(stored, nonce=b"n" * 12, header=b"header") == b"payload"
    assert sealer.open(stored, nonce=b"n" * 12, header=b"Header") is None


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(ConfigError, match=r"vllm-mlx\[encryption\]"):
        Sealer(KEY)
