"""How large a body may be."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import Request

from vllm_mlx.core.errors import PayloadTooLarge, UnsupportedEncoding

MIB = 1024 * 1024
_MAX_DISCARDED = 128 * MIB
_DISCARD_S = 5.0


async def read_body(request: Request, *, max_mb: int) -> bytes:
    """The whole body.

    Raises:
        PayloadTooLarge: by its announced length, or as soon as it has grown past the limit.
        UnsupportedEncoding: it is compressed.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedEncoding(f"The body has content-encoding '{encoding[:40]}'; send it uncompressed.")
    max_bytes = max_mb * MIB
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        if int(announced) <= _MAX_DISCARDED:
            await _discard(request)
        raise _too_large(max_mb)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            await _discard(request)
            raise _too_large(max_mb)
    return bytes(body)


async def _discard(request: Request) -> None:
    """Read on for a while without keeping anything: most clients look for an answer only when they have sent all."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while num_bytes < _MAX_DISCARDED:
                message = await request.receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _too_large(max_mb: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {max_mb} MiB, the limit set by --max-body-mb.")
