"""The lines of a batch: read, checked before anything runs, and answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from vllm_mlx.api.wire.batches import BatchError, BatchUsage, InputDetails, OutputDetails

MAX_LINES = 50_000
"""OpenAI's limit."""
MAX_ERRORS = 100
"""More are not listed."""
EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")
CANCELLED = ("batch_cancelled", "This request was not executed, for the batch was cancelled.")


class Line(msgspec.Struct, frozen=True):
    """One request of a batch."""

    number: int
    """From 1; blank lines count."""
    custom_id: str
    body: bytes
    """JSON, as it was written."""


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Wrong(Exception):
    """A line that cannot be carried out."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def read(source: BinaryIO, *, endpoint: str) -> Iterator[Line]:
    """The lines of a file that `check` found nothing wrong with."""
    for number, text in _lines(source):
        yield _parse(number, text, endpoint=endpoint)


def check(source: BinaryIO, *, endpoint: str) -> tuple[int, tuple[BatchError, ...]]:
    """How many lines there are, and what is wrong with them: either one or the other is empty."""
    seen: set[str] = set()
    errors: list[BatchError] = []
    total = 0
    for number, text in _lines(source):
        total += 1
        try:
            line = _parse(number, text, endpoint=endpoint)
            if line.custom_id in seen:
                message = f"The custom_id '{line.custom_id[:100]}' is used by an earlier line; each must be unique."
                raise _Wrong("duplicate_custom_id", message, "custom_id")
            seen.add(line.custom_id)
        except _Wrong as wrong:
            errors.append(BatchError(wrong.code, wrong.message, wrong.param, number))
        if len(errors) == MAX_ERRORS:
            break
        if total > MAX_LINES:
            errors = [BatchError("too_many_tasks", f"A batch may have at most {MAX_LINES} requests.")]
            break
    if not total:
        errors.append(BatchError("empty_file", "The file has no requests."))
    return (0 if errors else total), tuple(errors)


def _lines(source: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, text in enumerate(source, start=1):
        text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
        if text.strip():
            yield number, text


def _parse(number: int, text: bytes, *, endpoint: str) -> Line:
    """Raises _Wrong."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Wrong("invalid_json_line", "This line is not parseable as valid JSON.") from error
    if not isinstance(found, dict):
        raise _Wrong("invalid_json_line", "This line is not a JSON object.")
    for name in ("custom_id", "method", "url", "body"):
        if name not in found:
            raise _Wrong("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
    try:
        request = msgspec.json.decode(text, type=_Request)
    except msgspec.ValidationError as error:
        raise _Wrong("invalid_request", f"{str(error).rstrip('.')}.") from error
    if request.method != "POST":
        raise _Wrong("invalid_method", f"The method must be POST, not '{request.method[:20]}'.", "method")
    if request.url != endpoint:
        message = f"The URL provided for this request does not match the batch endpoint '{endpoint}'."
        raise _Wrong("invalid_url", message, "url")
    if not isinstance(found["body"], dict):
        raise _Wrong("invalid_request", "The body must be a JSON object.", "body")
    return Line(number, request.custom_id, bytes(request.body))


# ---- answers ----


class LineResponse(msgspec.Struct, frozen=True):
    """What the endpoint answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, frozen=True):
    """Why it was not asked."""

    code: str
    message: str


class LineAnswer(msgspec.Struct, frozen=True):
    """One line of an output or error file."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None = None

    @property
    def is_failed(self) -> bool:
        """Whether it belongs into the error file."""
        return self.response is None or self.response.status_code >= 400


class _Usage(msgspec.Struct, frozen=True):
    """Token counts of any endpoint's answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None
    completion_tokens_details: dict[str, Any] | None = None
    input_tokens_details: dict[str, Any] | None = None
    output_tokens_details: dict[str, Any] | None = None


class _Answer(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


def usage_of(body: bytes) -> BatchUsage:
    """The token counts in an answer."""
    usage = msgspec.json.decode(body, type=_Answer).usage or _Usage()
    num_input, num_output = usage.prompt_tokens or usage.input_tokens, usage.completion_tokens or usage.output_tokens
    given = usage.prompt_tokens_details or usage.input_tokens_details or {}
    made = usage.completion_tokens_details or usage.output_tokens_details or {}
    return BatchUsage(
        num_input,
        num_output,
        num_input + num_output,
        InputDetails(given.get("cached_tokens", 0)),
        OutputDetails(made.get("reasoning_tokens", 0)),
    )


def added(one: BatchUsage, other: BatchUsage) -> BatchUsage:
    """Counts of both together."""
    return BatchUsage(
        one.input_tokens + other.input_tokens,
        one.output_tokens + other.output_tokens,
        one.total_tokens + other.total_tokens,
        InputDetails(one.input_tokens_details.cached_tokens + other.input_tokens_details.cached_tokens),
        OutputDetails(one.output_tokens_details.reasoning_tokens + other.output_tokens_details.reasoning_tokens),
    )
