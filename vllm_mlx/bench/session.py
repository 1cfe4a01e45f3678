"""One run against one server: who it is, what is asked of it, and what it told."""

from __future__ import annotations

import platform
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from vllm_mlx import __version__
from vllm_mlx.bench import metrics
from vllm_mlx.bench.client import Ask, ChatClient, Message
from vllm_mlx.bench.http import HttpClient, parse_origin
from vllm_mlx.bench.options import RunOptions, Target
from vllm_mlx.bench.server import Facts, Server


class Progress(Protocol):
    """Shows how far a run is."""

    def begin(self, text: str, total: int) -> None:
        """A part of `total` requests begins."""

    def advance(self) -> None:
        """A request of it has ended."""


class Silent:
    """A progress that shows nothing."""

    def begin(self, text: str, total: int) -> None:
        """Nothing."""

    def advance(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A server that answered, and the model to ask."""

    options: RunOptions
    server: Server
    client: ChatClient
    model: str
    facts: Facts
    run_id: str
    started_at: str

    def ask(
        self,
        messages: tuple[Message, ...],
        *,
        max_tokens: int,
        thinking: bool | None,
        extra_body: Mapping[str, Any],
        temperature: float | None,
    ) -> Ask:
        """A question with what the run adds to every one."""
        more = {"ignore_eos": True} if self.options.questions.ignore_eos else {}
        return Ask(
            messages=messages,
            max_tokens=max_tokens,
            temperature=temperature,
            enable_thinking=thinking,
            extra_body=more | dict(extra_body),
        )

    def identity(self) -> dict[str, Any]:
        """The fields that every row begins with."""
        return {"run_id": self.run_id, "timestamp": now(), "tag": self.options.tag, "model_id": self.model}

    def provenance(self) -> dict[str, Any]:
        """Where figures come from."""
        return {
            "url": self.server.url,
            "model_id": self.model,
            "server": self.facts | self.options.overrides,
            "client": {"name": "vllm-mlx bench-serve", "version": __version__, "python": platform.python_version()},
            "seed": self.options.seed,
        }

    @asynccontextmanager
    async def counting(self, change: dict[str, float]) -> AsyncIterator[None]:
        """Fill `change` with what the server's counters did in the block; it stays empty if it has none."""
        is_wanted = self.options.scrape_metrics
        before = await self.server.counters() if is_wanted else {}
        yield
        if before:
            change.update(metrics.delta(before, await self.server.counters()))


async def open_session(options: RunOptions) -> Session:
    """Meet the server. Raises ServerUnusable."""
    target = options.target
    http = http_client(target)
    server = Server(http, url=target.url)
    model = await server.choose_model(target.model)
    return Session(
        options=options,
        server=server,
        client=ChatClient(http, model=model, endpoint=target.endpoint),
        model=model,
        facts=await server.facts(),
        run_id=uuid.uuid4().hex[:12],
        started_at=now(),
    )


def http_client(target: Target) -> HttpClient:
    """Connections to a target."""
    return HttpClient(parse_origin(target.url), api_key=target.api_key, timeout_s=target.timeout_s)


def now() -> str:
    """This moment in UTC, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
