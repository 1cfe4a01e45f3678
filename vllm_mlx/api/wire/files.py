"""Files as OpenAI describes them (https://platform.openai.com/docs/api-reference/files)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from pydantic import Field

from vllm_mlx.api.wire.base import WireModel

BATCH = "batch"
BATCH_OUTPUT = "batch_output"
OTHER_PURPOSES = ("assistants", "fine-tune", "vision", "user_data", "evals")
"""Of OpenAI's other services; this server has no use for such files."""
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
DEFAULT_EXPIRY_S = MAX_EXPIRY_S
"""Batch files are kept for 30 days unless told otherwise, as OpenAI keeps them."""


class ExpiresAfter(WireModel):
    """When a file is deleted by itself."""

    anchor: Literal["created_at"]
    """What the time is counted from: `created_at`, the creation of the file."""
    seconds: Annotated[int, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]
    """Seconds after that, from one hour to 30 days."""


class UploadFields(WireModel):
    """The fields of an upload besides the file itself."""

    purpose: Literal["batch"]
    """`batch`: JSON lines for POST /v1/batches."""
    expires_after: ExpiresAfter | None = None
    """When the file is deleted; after 30 days if absent."""


class FileAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One file."""

    id: str
    bytes: int
    """Its size."""
    created_at: int
    """Unix seconds."""
    expires_at: int | None
    """Unix seconds after which it is gone."""
    filename: str
    purpose: str
    status: str = "processed"
    object: str = "file"


class FileList(msgspec.Struct, frozen=True):
    """A page of files."""

    data: list[FileAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


class FileDeleted(msgspec.Struct, frozen=True):
    """A file that is gone."""

    id: str
    deleted: bool = True
    object: str = "file"
