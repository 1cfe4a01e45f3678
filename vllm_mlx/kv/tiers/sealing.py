"""Encryption of what lies on disk: AES-256-GCM (NIST SP 800-38D) with a key from a file."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_mlx.core.errors import ConfigError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
_MAX_KEY_FILE_BYTES = 1024


class Sealer:
    """Seals payloads with one key. Nonces must never repeat: random ones are good for 2**32 payloads a key."""

    def __init__(self, key: bytes) -> None:
        """Raises ConfigError if `key` is not 32 bytes, or if the package `cryptography` is missing."""
        if len(key) != KEY_BYTES:
            raise ConfigError(f"--ssd-cache-key-file: the key must have {KEY_BYTES} bytes, not {len(key)}.")
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ConfigError(
                "--ssd-cache-key-file needs the package cryptography: pip install 'vllm-mlx[encryption]'."
            ) from error
        self._cipher = AESGCM(key)
        self._invalid_tag = InvalidTag

    def seal(self, payload: bytes | memoryview, *, nonce: bytes, header: bytes) -> bytes:
        """The payload encrypted, and a tag of 16 bytes over it and over `header`, which stays readable."""
        return self._cipher.encrypt(nonce, payload, header)

    def open(self, stored: bytes, *, nonce: bytes, header: bytes) -> bytes | None:
        """The payload; None if it was sealed with another key, nonce or header."""
        try:
            return self._cipher.decrypt(nonce, stored, header)
        except self._invalid_tag:
            return None


def read_key(path: Path) -> bytes:
    """The key in a file: 32 bytes as they are, or 64 hexadecimal digits with space around. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"--ssd-cache-key-file: {path} cannot be read: {error.strerror}.") from error
    if len(content) == KEY_BYTES:
        return content
    text = content.strip()
    if re.fullmatch(rb"[0-9a-fA-F]{64}", text):
        return bytes.fromhex(text.decode("ascii"))
    raise ConfigError(
        f"--ssd-cache-key-file: {path} must hold {KEY_BYTES} bytes or 64 hexadecimal digits "
        "(openssl rand -hex 32 makes them)."
    )
