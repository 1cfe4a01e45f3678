"""What a coding agent needs to be told, as data, and what becomes of it for one server."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import msgspec

NO_KEY = "no-key"
"""Sent where the server needs no key: clients refuse to start without one."""
_MAX_OUTPUT_PART = 4
"""An answer may take this part of the context; the rest is for the conversation."""
_MAX_OUTPUT_TOKENS = 32_768
_COMPACT_PERCENT = 80
"""A conversation is compacted when it fills so much of the context: results of tools and an answer must still fit."""
_WIDE_TOKENS = 100_000
_RESULT_PART = 8
"""One result of a tool may take this part of the context."""
_MAX_RESULT_TOKENS = 10_000

Ask = Callable[..., str | None]
"""Runs the client with these arguments, and returns what it prints; None if it is not there, or fails."""


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """A coding agent.

    Texts may hold `$url` (of the server, without /v1), `$model`, `$key`, `$folder` (where `files` are) and, in tokens,
    `$context`, `$wide` (the context, at least 100,000), `$output` (of an answer), `$input` (the context without it),
    `$result` (of a tool) and `$compact` (a conversation that is to be compacted). In a file, a text that is nothing
    but one of these becomes a number.
    """

    name: str
    """What the user types."""
    title: str
    executable: str
    install: str
    """Command that installs it."""
    environment: Mapping[str, str] = {}
    unset: tuple[str, ...] = ()
    """Variables that would lead it to another server."""
    files: Mapping[str, Any] = {}
    """Path under `$folder` -> JSON value."""
    arguments: tuple[str, ...] = ()
    """Before the user's own."""
    min_context_tokens: int = 0
    """Below this there is too little room beside its own prompt."""
    refine: Callable[[Client, Ask], Client] | None = None
    """What becomes of the record when the client has been asked about itself."""


class Target(msgspec.Struct, frozen=True):
    """A server, as a client sees it."""

    url: str
    """Without /v1 and without a slash at the end."""
    model: str
    context_tokens: int
    """Prompt and output together."""
    key: str | None = None
    max_output_tokens: int | None = None
    """Most that the server lets a request ask for; None if it does not say."""

    @property
    def output_tokens(self) -> int:
        """Most that one answer should take."""
        limit = self.max_output_tokens or _MAX_OUTPUT_TOKENS
        return max(1, min(limit, _MAX_OUTPUT_TOKENS, self.context_tokens // _MAX_OUTPUT_PART))

    @property
    def result_tokens(self) -> int:
        """Most that one result of a tool should take."""
        return max(1, min(_MAX_RESULT_TOKENS, self.context_tokens // _RESULT_PART))

    @property
    def compact_tokens(self) -> int:
        """When a conversation should be compacted."""
        return self.context_tokens * _COMPACT_PERCENT // 100


class Setup(msgspec.Struct, frozen=True):
    """A client's settings with everything filled in."""

    environment: dict[str, str]
    unset: tuple[str, ...]
    files: dict[Path, str]
    """Where -> text."""
    command: tuple[str, ...]
    """Executable and its first arguments."""

    def write(self) -> None:
        """Write the files, readable by their owner only: they may hold a key."""
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(text)

    def environment_from(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The environment to run the client in."""
        kept = {name: value for name, value in inherited.items() if name not in self.unset}
        return {**kept, **self.environment}


def no_answer(*_arguments: str) -> None:
    """Of a client that is not there to be asked."""


def set_up(client: Client, target: Target, *, folder: Path, ask: Ask = no_answer) -> Setup:
    """Fill a client's texts in for a server; nothing is written."""
    client = client.refine(client, ask) if client.refine is not None else client
    values = {
        "url": target.url,
        "model": target.model,
        "key": target.key or NO_KEY,
        "context": str(target.context_tokens),
        "wide": str(max(_WIDE_TOKENS, target.context_tokens)),
        "output": str(target.output_tokens),
        "input": str(target.context_tokens - target.output_tokens),
        "result": str(target.result_tokens),
        "compact": str(target.compact_tokens),
        "folder": str(folder),
    }
    return Setup(
        environment={name: _filled(text, values) for name, text in client.environment.items()},
        unset=client.unset,
        files={
            folder / name: json.dumps(_filled_json(value, values), indent=2) + "\n"
            for name, value in client.files.items()
        },
        command=(client.executable, *(_filled(text, values) for text in client.arguments)),
    )


def literal(value: Any) -> Any:
    """A JSON value whose texts are taken as they are."""
    if isinstance(value, dict):
        return {literal(name): literal(part) for name, part in value.items()}
    if isinstance(value, list):
        return [literal(part) for part in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


_NUMBERS = ("$context", "$wide", "$output", "$input", "$result", "$compact")


def _filled(text: str, values: Mapping[str, str]) -> str:
    return Template(text).substitute(values)


def _filled_json(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {_filled(name, values): _filled_json(part, values) for name, part in value.items()}
    if isinstance(value, list):
        return [_filled_json(part, values) for part in value]
    if value in _NUMBERS:
        return int(values[value[1:]])
    return _filled(value, values) if isinstance(value, str) else value
