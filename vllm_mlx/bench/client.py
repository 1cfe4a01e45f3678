"""Turns a question into a request, and a server's answer into a sample."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from vllm_mlx.bench.http import BrokenOff, ConnectionFailed, HttpClient, TimedOut
from vllm_mlx.bench.sample import Failure, FailureKind, Sample
from vllm_mlx.bench.stream import StreamRecorder, message_of

Message = Mapping[str, Any]
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
"""Endpoint name -> path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question and how it shall be answered."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float | None = None
    """None: the server's default."""
    enable_thinking: bool | None = None
    """A variable of the chat template; None: the server's default."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request; they win over the others, and null takes a field out."""


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None


class _Whole(msgspec.Struct):
    usage: _Usage | None = None


class ChatClient:
    """Asks one model of one server, streamed."""

    def __init__(self, http: HttpClient, *, model: str, endpoint: str = "chat") -> None:
        self._http = http
        self._model = model
        self._endpoint = endpoint

    def encode(self, ask: Ask) -> bytes:
        """The request's body."""
        return msgspec.json.encode(self.body(ask))

    def body(self, ask: Ask) -> dict[str, Any]:
        """The request's fields."""
        fields: dict[str, Any] = {"model": self._model}
        if self._endpoint == "chat":
            fields["messages"] = ask.messages
        else:
            fields["prompt"] = "\n\n".join(str(message.get("content", "")) for message in ask.messages)
        fields |= {"max_tokens": ask.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        fields["temperature"] = ask.temperature
        if ask.enable_thinking is not None and self._endpoint == "chat":
            fields["chat_template_kwargs"] = {"enable_thinking": ask.enable_thinking}
        fields |= ask.extra_body
        return {name: value for name, value in fields.items() if value is not None}

    async def send(self, body: bytes, *, origin_s: float = 0.0) -> Sample:
        """Send an encoded request; whatever goes wrong is in the sample. `origin_s`: start of the load's clock."""
        recorder = StreamRecorder(time.perf_counter())
        failure = None
        try:
            answer = await self._http.request("POST", PATHS[self._endpoint], body=body, on_data=recorder.feed)
            if not 200 <= answer.status < 300:
                failure = Failure(FailureKind.STATUS, error_text(answer.body), answer.status)
        except ConnectionFailed as error:
            failure = Failure(FailureKind.CONNECTION, str(error))
        except TimedOut as error:
            failure = Failure(FailureKind.TIMEOUT, str(error))
        except BrokenOff as error:
            failure = Failure(FailureKind.BROKEN_STREAM, str(error))
        return recorder.sample(failure, origin_s=origin_s)

    async def count_prompt_tokens(self, ask: Ask) -> int | None:
        """Prompt tokens as a whole (not streamed) answer of one token reports them; None if it does not."""
        fields = self.body(replace(ask, max_tokens=1)) | {"stream": False}
        fields.pop("stream_options", None)
        try:
            answer = await self._http.request("POST", PATHS[self._endpoint], body=msgspec.json.encode(fields))
            usage = msgspec.json.decode(answer.body, type=_Whole).usage
        except (ConnectionFailed, TimedOut, BrokenOff, msgspec.DecodeError):
            return None
        return usage.prompt_tokens if usage else None

    async def ask(self, ask: Ask) -> Sample:
        """Encode and send."""
        return await self.send(self.encode(ask))


def error_text(body: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        text = message_of(msgspec.json.decode(body))
    except msgspec.DecodeError:
        text = body.decode(errors="replace")
    return " ".join(text.split())[:500]
