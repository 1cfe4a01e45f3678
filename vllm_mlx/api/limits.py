"""How large a body may be."""

from __future__ import annotations

from starlette.requests import Request

from vllm_mlx.core.errors import PayloadTooLarge

MIB = 1024 * 1024


async def read_body(request: Request, *, max_mb: int) -> bytes:
    """The whole body. Raises PayloadTooLarge by its announced length, or as soon as it has grown past the limit."""
    max_bytes = max_mb * MIB
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_mb)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_mb)
    return bytes(body)


def _too_large(max_mb: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {max_mb} MiB, the limit set by --max-body-mb.")
