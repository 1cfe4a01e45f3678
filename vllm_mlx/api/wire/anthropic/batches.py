"""Batches as Anthropic describes them (https://platform.claude.com/docs/en/api/messages/batches)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field

from vllm_mlx.api.batches.lines import CANCELLED, MAX_LINES, LineAnswer
from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.api.wire.batches import BatchAnswer, BatchStatus
from vllm_mlx.core.errors import InvalidRequest

PATH = "/v1/messages"
ID_PREFIX = "msgbatch_"


class BatchRequest(WireModel):
    """One message to be made."""

    custom_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    """The client's name of it: letters, digits, `_` and `-`, at most 64."""
    params: dict[str, Any]
    """A body of POST /v1/messages, without `stream`; what is wrong with it is told in its result."""


class MessageBatchBody(WireModel):
    """Messages to be made when nobody else needs the model."""

    requests: Annotated[list[BatchRequest], Field(min_length=1, max_length=MAX_LINES, fail_fast=True)]
    """At most 50,000."""


class MessageCounts(msgspec.Struct, frozen=True):
    """How many requests are where; all are processing until the batch has ended."""

    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0


class MessageBatchAnswer(msgspec.Struct, frozen=True, tag="message_batch"):
    """One batch. Times are RFC 3339."""

    id: str
    processing_status: str
    """'in_progress', 'canceling' or 'ended'."""
    request_counts: MessageCounts
    created_at: str
    expires_at: str
    ended_at: str | None
    cancel_initiated_at: str | None
    results_url: str | None
    archived_at: None = None


class MessageBatchList(msgspec.Struct, frozen=True):
    """A page of batches, latest first."""

    data: list[MessageBatchAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedBatch(msgspec.Struct, frozen=True, tag="message_batch_deleted"):
    """A batch that is gone."""

    id: str


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a request: 'succeeded', 'errored', 'canceled' or 'expired'."""

    type: str
    message: msgspec.Raw | UnsetType = UNSET
    error: msgspec.Raw | UnsetType = UNSET


class ResultLine(msgspec.Struct, frozen=True):
    """One line of the results."""

    custom_id: str
    result: Result


def input_lines(body: MessageBatchBody) -> Iterator[bytes]:
    """The requests as lines of a batch file. Raises InvalidRequest for those that no batch can have."""
    seen: set[str] = set()
    for position, request in enumerate(body.requests):
        if request.custom_id in seen:
            param = f"requests.{position}.custom_id"
            raise InvalidRequest(f"{param}: '{request.custom_id}' is used twice; each must be unique.", param=param)
        seen.add(request.custom_id)
        if request.params.get("stream"):
            param = f"requests.{position}.params.stream"
            raise InvalidRequest(f"{param} must not be true in a batch.", param=param)
        line = {"custom_id": request.custom_id, "method": "POST", "url": PATH, "body": request.params}
        yield msgspec.json.encode(line) + b"\n"


def batch_answer(batch: BatchAnswer, *, num_left: int, results_url: str) -> MessageBatchAnswer:
    """A batch in this dialect; `num_left` of its requests were never begun."""
    counts, total = batch.request_counts, batch.request_counts.total
    shown = MessageCounts(processing=total)
    if batch.is_ended:
        is_cancelled = batch.status is BatchStatus.CANCELLED
        shown = MessageCounts(
            succeeded=counts.completed,
            errored=(total if batch.status is BatchStatus.FAILED else counts.failed) - num_left,
            canceled=num_left if is_cancelled else 0,
            expired=0 if is_cancelled else num_left,
        )
    ends = (batch.completed_at, batch.failed_at, batch.expired_at, batch.cancelled_at)
    return MessageBatchAnswer(
        id=batch.id,
        processing_status="ended" if batch.is_ended else _STATUSES.get(batch.status, "in_progress"),
        request_counts=shown,
        created_at=_time(batch.created_at) or "",
        expires_at=_time(batch.expires_at) or "",
        ended_at=_time(next((end for end in ends if end is not None), None)),
        cancel_initiated_at=_time(batch.cancelling_at),
        results_url=results_url if batch.is_ended else None,
    )


def result_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Results in this dialect, made of the lines of output and error files."""
    for line in lines:
        answer = msgspec.json.decode(line, type=LineAnswer)
        yield msgspec.json.encode(ResultLine(answer.custom_id, _result(answer))) + b"\n"


def _result(answer: LineAnswer) -> Result:
    if answer.response is None:
        is_cancelled = answer.error is not None and answer.error.code == CANCELLED[0]
        return Result("canceled" if is_cancelled else "expired")
    body = answer.response.body
    return Result("errored", error=body) if answer.is_failed else Result("succeeded", message=body)


_STATUSES = {BatchStatus.CANCELLING: "canceling"}


def _time(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
