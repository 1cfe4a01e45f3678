"""Batches as OpenAI describes them (https://platform.openai.com/docs/api-reference/batch)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from pydantic import Field

from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.api.wire.files import ExpiresAfter
from vllm_mlx.core.errors import InvalidRequest

_UNIT_S = {"m": 60, "h": 3600, "d": 86_400}
_MAX_WINDOW_S = 30 * 86_400

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class BatchBody(WireModel):
    """Which requests to carry out, and how soon."""

    input_file_id: str
    """A file uploaded with the purpose `batch`: one JSON object a line."""
    endpoint: str
    """The path that every line is sent to, such as `/v1/chat/completions`."""
    completion_window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}[mhd]$")]
    """`24h` as in OpenAI's API, or another number of minutes, hours or days up to 30 days (`30m`, `2h`, `7d`): what is
    not done by then expires."""
    metadata: Metadata | None = None
    """Up to 16 texts by name, returned with the batch."""
    output_expires_after: ExpiresAfter | None = None
    """When the output and error files are deleted; 30 days after they are written if absent."""


class BatchStatus(StrEnum):
    """Where a batch stands."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset({BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})
"""After these nothing changes any more."""


class BatchError(msgspec.Struct, frozen=True):
    """Why a batch failed before any of its requests ran."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """From 1."""


class BatchErrors(msgspec.Struct, frozen=True):
    """All such reasons, or the first of very many."""

    data: tuple[BatchError, ...]
    object: str = "list"


class RequestCounts(msgspec.Struct, frozen=True):
    """How many lines there are, and how many are done."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    """What generated tokens were."""

    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, frozen=True):
    """Token counts over all lines."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: InputDetails = InputDetails()
    output_tokens_details: OutputDetails = OutputDetails()


class BatchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One batch; also the record that is kept of it. All times are Unix seconds."""

    id: str
    object: str = "batch"
    endpoint: str
    model: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus = BatchStatus.VALIDATING
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: BatchUsage = BatchUsage()
    metadata: dict[str, str] | None = None

    @property
    def is_ended(self) -> bool:
        """Whether nothing changes any more."""
        return self.status in ENDED


class BatchList(msgspec.Struct, frozen=True):
    """A page of batches, latest first."""

    data: list[BatchAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


def window_s(text: str) -> int:
    """Seconds of a completion window such as '24h'. Raises InvalidRequest for more than 30 days."""
    seconds = int(text[:-1]) * _UNIT_S[text[-1]]
    if seconds > _MAX_WINDOW_S:
        raise InvalidRequest("completion_window must be at most 30 days.", param="completion_window")
    return seconds
