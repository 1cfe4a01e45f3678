"""The file format: exact bytes or an error."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.kv.tiers.record import (
    HEADER_BYTES,
    CorruptRecordError,
    ForeignRecordError,
    Identity,
    Kind,
    decode,
    encode,
    stored_size,
)
from vllm_mlx.kv.tiers.sealing import Sealer

IDENTITY = Identity(Kind.PAGE, b"f" * 16, b"n" * 16)
SEALER = Sealer(b"k" * 32)
SEALERS = pytest.mark.parametrize("sealer", [None, SEALER], ids=["plain", "sealed"])


def whole(payload: bytes, *, sealer: Sealer | None = None, identity: Identity = IDENTITY) -> bytes:
    return b"".join(encode(payload, identity, sealer=sealer))


def opened(content: bytes, *, sealer: Sealer | None = None, identity: Identity = IDENTITY) -> bytes:
    return decode(content[:HEADER_BYTES], content[HEADER_BYTES:], identity, sealer=sealer)


@SEALERS
@given(payload=st.binary(max_size=200))
def test_payload_comes_back_exactly(sealer: Sealer | None, payload: bytes) -> None:
    content = whole(payload, sealer=sealer)
    assert opened(content, sealer=sealer) == payload
    assert len(content) == stored_size(len(payload), sealed=sealer is not None)


def test_layout_is_the_documented_one() -> None:
    content = whole(b"payload")
    assert HEADER_BYTES == 80
    assert struct.unpack_from("<8sHBB16s16sQ12s", content) == (
        *(b"VLLMBLOB", 1, 1, 0, b"f" * 16, b"n" * 16),
        *(7, bytes(12)),
    )
    assert content[80:] == b"payload"


@SEALERS
def test_torn_at_every_byte_is_corrupt(sealer: Sealer | None) -> None:
    content = whole(b"some payload", sealer=sealer)
    for length in range(len(content)):
        with pytest.raises(CorruptRecordError):
            opened(content[:length], sealer=sealer)
    with pytest.raises(CorruptRecordError):
        opened(content + b"x", sealer=sealer)


@SEALERS
def test_every_flipped_bit_is_seen(sealer: Sealer | None) -> None:
    content = whole(b"some payload", sealer=sealer)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptRecordError, ForeignRecordError)):
            opened(bytes(flipped), sealer=sealer)


def test_other_version_is_foreign() -> None:
    content = bytearray(whole(b"payload"))
    content[8] = 2
    with pytest.raises(ForeignRecordError, match="version 2"):
        opened(bytes(content))


def test_other_model_is_foreign() -> None:
    with pytest.raises(ForeignRecordError, match="another model"):
        opened(whole(b"payload"), identity=IDENTITY._replace(fingerprint=b"g" * 16))


@pytest.mark.parametrize("changed", [{"name": b"m" * 16}, {"kind": Kind.CHECKPOINT}])
def test_record_under_the_wrong_name_is_corrupt(changed: dict[str, object]) -> None:
    with pytest.raises(CorruptRecordError, match="name of another"):
        opened(whole(b"payload"), identity=IDENTITY._replace(**changed))


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(SEALER, None), (None, SEALER), (SEALER, Sealer(b"other" + b"k" * 27))],
    ids=["sealed-plain", "plain-sealed", "other-key"],
)
def test_other_sealing_is_foreign(writer: Sealer | None, reader: Sealer | None) -> None:
    with pytest.raises(ForeignRecordError, match="encrypted"):
        opened(whole(b"payload", sealer=writer), sealer=reader)


def test_sealed_payload_is_not_readable_and_never_the_same() -> None:
    first, second = whole(b"secret" * 10, sealer=SEALER), whole(b"secret" * 10, sealer=SEALER)
    assert b"secret" not in first
    assert first[HEADER_BYTES:] != second[HEADER_BYTES:]
