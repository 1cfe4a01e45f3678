"""Reasoning that clients carry: opaque to them, and taken back only as it was given out.

A seal is base64 of a keyed hash (HMAC, RFC 2104, with SHA-256) and the text. It protects against changes, not against
reading: the text is shown in the same item.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from vllm_mlx.core.errors import InvalidRequest

KEY_BYTES = 32
_VERSION = "vr1."
_SIGNED = "vs1."
_MAC_BYTES = hashlib.sha256().digest_size


class Sealer:
    """Seals and unseals with one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, text: str) -> str:
        """The text as a blob."""
        data = text.encode("utf-8", "surrogatepass")
        return _VERSION + base64.urlsafe_b64encode(self._mac(data) + data).decode()

    def sign(self, text: str) -> str:
        """What vouches for a text without containing it."""
        return _SIGNED + base64.urlsafe_b64encode(self._mac(text.encode("utf-8", "surrogatepass"))).decode()

    def unseal(self, blob: str) -> str:
        """The text of a blob. Raises InvalidRequest if it was changed or sealed with another key."""
        text = self.find(blob)
        if text is None:
            raise InvalidRequest(
                "encrypted_content of a reasoning item was changed, or comes from another server or from before a "
                "restart. Leave the item out; --response-store PATH makes the server keep its key.",
                param="input",
                code="invalid_encrypted_content",
            )
        return text

    def find(self, blob: str) -> str | None:
        """The text of a blob; None if it is not one, was changed or sealed with another key."""
        try:
            raw = base64.b64decode(
                blob.removeprefix(_VERSION).encode("ascii", "replace"), altchars=b"-_", validate=True
            )
        except binascii.Error:
            raw = b""
        mac, data = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not blob.startswith(_VERSION) or not hmac.compare_digest(mac, self._mac(data)):
            return None
        return data.decode("utf-8", "surrogatepass")

    def _mac(self, data: bytes) -> bytes:
        return hmac.digest(self._key, data, "sha256")
