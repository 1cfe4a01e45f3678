"""Every error the product raises on purpose.

VllmMlxError
├── RequestError                  the caller's fault; becomes an HTTP answer
│   ├── InvalidRequest            400
│   │   ├── ContextLengthExceeded 400
│   │   └── OutputLimitExceeded   400
│   ├── Unauthorized              401
│   ├── NotFound                  404
│   ├── PayloadTooLarge           413
│   ├── UnsupportedEncoding       415
│   ├── RequestTimeout            504
│   ├── ServerBusy                503, with Retry-After
│   └── EngineFailure             500 (this request) or 503 (no engine)
└── StartupError                  the operator's fault; one line and exit code 2
    ├── ConfigError               a setting is wrong
    ├── ModelError                the model is unknown, broken or not supported
    └── EngineStartError          the engine process could not start
"""

from __future__ import annotations


class VllmMlxError(Exception):
    """Root of the tree. `message` is written for the person who reads it, not for a log."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(VllmMlxError):
    """One request cannot be served; `param` names the field at fault, in the caller's own dialect."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(RequestError):
    """A field is missing, unknown, of the wrong type or out of range."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested output do not fit the model's context."""

    code = "context_length_exceeded"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        num_tokens: int = 0,
        max_tokens: int = 0,
    ) -> None:
        """`num_tokens` is what the prompt has, or at least has, and `max_tokens` what it may have; 0: not known."""
        super().__init__(message, param=param, code=code)
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


class OutputLimitExceeded(InvalidRequest):
    """The request asks for a longer answer than the server gives."""

    def __init__(self, message: str, *, param: str | None = None, num_tokens: int, max_tokens: int) -> None:
        """`num_tokens` is what was asked for, and `max_tokens` what may be."""
        super().__init__(message, param=param)
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(RequestError):
    """The model, path or object does not exist."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class PayloadTooLarge(RequestError):
    """The body is larger than `--max-body-mb`."""

    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class UnsupportedEncoding(RequestError):
    """The body is compressed (RFC 9110, section 15.5.16)."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_encoding"


class RequestTimeout(RequestError):
    """The request ran longer than its `timeout`."""

    status = 504
    type = "timeout_error"
    code = "timeout"


class ServerBusy(RequestError):
    """The waiting queue is full or the server is draining; try again after `retry_after_s` seconds."""

    status = 503
    type = "overloaded_error"
    code = "server_busy"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailure(RequestError):
    """The engine failed on this request (500), or there is no engine to serve it (503)."""

    status = 500
    type = "server_error"
    code = "engine_error"

    def __init__(self, message: str, *, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class StartupError(VllmMlxError):
    """The server cannot start; the command prints the message on one line and exits with code 2."""


class ConfigError(StartupError):
    """A flag, environment variable or combination of settings is wrong."""


class ModelError(StartupError):
    """The model cannot be found, read or run."""


class EngineStartError(StartupError):
    """The engine process ended or fell silent before it was ready."""


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its class if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
