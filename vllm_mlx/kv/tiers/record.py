"""One blob as a file: a header of 80 bytes, then the payload. The table of fields is in docs/design/008-ssd-tier.md."""

from __future__ import annotations

import hashlib
import os
import struct
from enum import IntEnum
from typing import NamedTuple

from vllm_mlx.kv.tiers.sealing import NONCE_BYTES, TAG_BYTES, Sealer

MAGIC = b"VLLMBLOB"
VERSION = 1
NAME_BYTES = 16
_SEALED = 1
_FIELDS = struct.Struct(f"<8sHBB{NAME_BYTES}s{NAME_BYTES}sQ{NONCE_BYTES}s")
_DIGEST_BYTES = 16
HEADER_BYTES = _FIELDS.size + _DIGEST_BYTES


class Kind(IntEnum):
    """What the bytes are; a page and a checkpoint may have the same name."""

    PAGE = 1
    """A page of all layers of a group."""
    CHECKPOINT = 2
    """States of layers that cannot be cut, at the end of a page."""


class Identity(NamedTuple):
    """What a record must say of itself to be believed."""

    kind: Kind
    fingerprint: bytes
    """16 bytes of everything that the payload's meaning depends on: weights, layout, page size, types."""
    name: bytes
    """16 bytes."""


class CorruptRecordError(ValueError):
    """The bytes are not what was written, or lie in the wrong place: of no use to anybody."""


class ForeignRecordError(ValueError):
    """A whole record that is not ours to read: of another format, model or key."""


class _Header(NamedTuple):
    magic: bytes
    version: int
    kind: int
    flags: int
    fingerprint: bytes
    name: bytes
    stored_bytes: int
    nonce: bytes


def stored_size(payload_bytes: int, *, sealed: bool) -> int:
    """Size of the file of a payload."""
    return HEADER_BYTES + payload_bytes + (TAG_BYTES if sealed else 0)


def encode(
    payload: bytes | memoryview, identity: Identity, *, sealer: Sealer | None
) -> tuple[bytes, bytes | memoryview]:
    """Header and stored payload, to be written one after the other."""
    stored_bytes = stored_size(memoryview(payload).nbytes, sealed=sealer is not None) - HEADER_BYTES
    flags, nonce = (_SEALED, os.urandom(NONCE_BYTES)) if sealer else (0, bytes(NONCE_BYTES))
    header = _Header(MAGIC, VERSION, identity.kind, flags, identity.fingerprint, identity.name, stored_bytes, nonce)
    fields = _FIELDS.pack(*header)
    stored = sealer.seal(payload, nonce=nonce, header=fields) if sealer else payload
    return fields + _digest(fields, stored), stored


def decode(header: bytes, stored: bytes, identity: Identity, *, sealer: Sealer | None) -> bytes:
    """The payload, exactly as it was given to `encode` under the same identity.

    Raises CorruptRecordError or ForeignRecordError. The version is looked at before the digest, because only its own
    version knows where a record keeps it.
    """
    if len(header) != HEADER_BYTES:
        raise CorruptRecordError("the header is torn")
    fields, digest = header[: _FIELDS.size], header[_FIELDS.size :]
    found = _Header(*_FIELDS.unpack(fields))
    if found.magic != MAGIC:
        raise CorruptRecordError("no record of this program")
    if found.version != VERSION:
        raise ForeignRecordError(f"format version {found.version}, not {VERSION}")
    if found.stored_bytes != len(stored) or _digest(fields, stored) != digest:
        raise CorruptRecordError("the checksum does not fit")
    return _opened(found, stored, identity, fields=fields, sealer=sealer)


def _opened(found: _Header, stored: bytes, identity: Identity, *, fields: bytes, sealer: Sealer | None) -> bytes:
    """The payload of a whole record, if it is the one that is looked for."""
    if found.fingerprint != identity.fingerprint:
        raise ForeignRecordError("of another model")
    if (found.kind, found.name) != (identity.kind, identity.name):
        raise CorruptRecordError("the file has the name of another record")
    if found.flags != (_SEALED if sealer else 0):
        raise ForeignRecordError("encrypted" if sealer is None else "not encrypted")
    payload = sealer.open(stored, nonce=found.nonce, header=fields) if sealer else stored
    if payload is None:
        raise ForeignRecordError("encrypted with another key")
    return payload


def _digest(fields: bytes, stored: bytes | memoryview) -> bytes:
    """SHA-256, shortened: processors have instructions for it, so that it is twice as fast as BLAKE2b."""
    digest = hashlib.sha256(fields)
    digest.update(stored)
    return digest.digest()[:_DIGEST_BYTES]
