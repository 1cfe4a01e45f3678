"""Reading an upload (multipart/form-data, RFC 7578) without holding it in memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from vllm_mlx.api.limits import MIB
from vllm_mlx.core.errors import InvalidRequest, PayloadTooLarge

_MAX_FIELDS = 16
_OVERHEAD_BYTES = 64 * 1024
"""What the form's other fields and its boundaries may take."""
_NESTED = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


@contextlib.asynccontextmanager
async def uploaded(request: Request, *, max_mb: int) -> AsyncIterator[tuple[UploadFile, bytes]]:
    """The field `file`, on disk while the block runs if it is large, and the other fields as a JSON object.

    Fields named `a[b]` become an object `a`; digits become numbers.

    Raises:
        InvalidRequest: it is no form, or has no file.
        PayloadTooLarge: it is larger than `max_mb`; known by its announced length, or once so much has come.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequest("The body must be a form (multipart/form-data) with the fields file and purpose.")
    parser = MultiPartParser(request.headers, _bounded(request, max_mb=max_mb), max_files=1, max_fields=_MAX_FIELDS)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InvalidRequest(f"The form cannot be read: {getattr(error, 'message', error)}.") from error
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("file is required.", param="file", code="missing_required_parameter")
        yield file, msgspec.json.encode(_fields(form))
    finally:
        await form.close()


async def _bounded(request: Request, *, max_mb: int) -> AsyncGenerator[bytes, None]:
    max_bytes = max_mb * MIB + _OVERHEAD_BYTES
    announced = request.headers.get("content-length", "")
    num_bytes = int(announced) if announced.isdigit() else 0
    if num_bytes <= max_bytes:
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                break
            yield chunk
    if num_bytes > max_bytes:
        raise PayloadTooLarge(f"The file is larger than {max_mb} MiB, the limit set by --files-max-mb.")


def _fields(form: FormData) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in form.multi_items():
        if name == "file" or not isinstance(value, str):
            continue
        nested = _NESTED.fullmatch(name)
        if nested is None:
            found[name] = value
            continue
        inner = found.setdefault(nested[1], {})
        if isinstance(inner, dict):
            inner[nested[2]] = int(value) if value.isascii() and value.isdigit() and len(value) < 19 else value
    return found
