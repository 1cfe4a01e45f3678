"""Time to the first token of a long prompt, over HTTP: cold, again, with another last message, after a restart."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tokenizers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from prefix_tables import Seconds, wait_written  # noqa: E402
from run import find_uv, say  # noqa: E402
from servers import (  # noqa: E402
    OURS,
    SERVERS,
    Installation,
    Server,
    Unusable,
    free_port,
    install,
    wait_ready,
)
from serving import started  # noqa: E402

MAX_TOKENS = 4
REQUEST_TIMEOUT_S = 1800
TEMPLATE_TOKENS = 40
"""About what a chat template and the last message add to the long one."""
WORDS = ("river", "stone", "lamp", "window", "garden", "letter", "bridge", "engine", "paper", "silver", "signal")
PATIENT = ("--timeout", f"{REQUEST_TIMEOUT_S}")
FLAGS = {OURS: ("--ssd-cache-dir", "{disk}", *PATIENT), "vllm-mlx": ("--ssd-cache-dir", "{disk}", *PATIENT)}
"""Servers that can keep prefixes on disk, and how; the others are not started again."""


@dataclass(frozen=True)
class Served:
    """A running server: where it is, and the model's name there."""

    url: str
    model: str
    client: httpx.Client
    """Made before anything is timed: making one reads the machine's certificates, which takes tens of milliseconds."""


@dataclass(frozen=True)
class Answered:
    """What one streamed answer told."""

    ttft_s: float
    num_prompt: int
    num_cached: int | None
    """None: the server does not say."""
    text: str = ""


def long_text(num_tokens: int, *, folder: Path, seed: str) -> str:
    """Random words of about `num_tokens` tokens for the model's tokenizer."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    draw = random.Random(seed)
    text, count = f"{draw.randrange(1000)}", 1
    while count < num_tokens:
        more = "".join(f" {word}" for word in draw.choices(WORDS, k=16))
        text, count = text + more, count + len(tokenizer.encode(more, add_special_tokens=False).ids)
    return text


def messages(text: str, question: str) -> list[dict[str, str]]:
    """A conversation whose last message is the question."""
    return [{"role": "system", "content": f"Notes: {text}"}, {"role": "user", "content": question}]


def ask(served: Served, conversation: list[Any], *, max_tokens: int = MAX_TOKENS) -> Answered:
    """Stream an answer. Raises Unusable if the server refuses or fails."""
    body = {
        "model": served.model,
        "messages": conversation,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, usage, text = time.perf_counter(), None, {}, ""
    try:
        with served.client.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise Unusable(f"answered {response.status_code}: {response.read().decode(errors='replace')[:400]}")
            for event in events(response):
                if "error" in event:
                    raise Unusable(f"failed: {event['error']}")
                usage = event.get("usage") or usage
                choices = event.get("choices", ())
                said = "".join(choice["delta"].get("content") or "" for choice in choices)
                if said or any(choice.get("finish_reason") for choice in choices):  # it may end at once
                    first = first or time.perf_counter() - begun
                text += said
    except httpx.HTTPError as error:
        raise Unusable(f"broke off: {error!r}") from error
    if first is None:
        raise Unusable("ended without an answer")
    details = usage.get("prompt_tokens_details") or {}
    return Answered(first, usage.get("prompt_tokens", 0), details.get("cached_tokens"), text)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The data of a stream's events."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def running(
    server: Server, installation: Installation, *, model: Path, work: Path, flags: tuple[str, ...] = ()
) -> Iterator[Served]:
    """The server, ready. It has `work` as its home, so that nothing of another run is found."""
    port = free_port()
    command = server.fill(installation, model=model, port=port, extra=flags)
    variables: Mapping[str, str] = {"HOME": str(work)} if server.keeps_files else {}
    if installation.is_foreign:
        variables = {**variables, "PYTHONPATH": ""}
    log = work / f"{server.name}.log"
    with started(command, log=log, variables=variables, folder=work if installation.is_foreign else None) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, f"{url}{server.ready_path}", log=log)
        name = (server.model_id or "{model}").format(model=model) if server.name != OURS else "default"
        with httpx.Client(timeout=REQUEST_TIMEOUT_S) as client:
            yield Served(url, name, client)


class Measurement:
    """All servers, round by round: each starts, answers, is stopped and starts again on the same folder."""

    def __init__(self, arguments: argparse.Namespace, *, model: Path, work: Path) -> None:
        self._arguments = arguments
        self._model = model
        self._work = work
        self.seconds: dict[str, Seconds] = {}
        self.tokens: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, str] = {}

    def run(self) -> None:
        """Until the last round; a server that fails is left out from then on."""
        for number in range(self._arguments.rounds):
            for name in (OURS, *self._arguments.peers):
                if name in self.errors:
                    continue
                try:
                    self._round(SERVERS[name], number)
                except Unusable as error:
                    say(f"{name}: {error}")
                    self.errors[name] = str(error)

    def _round(self, server: Server, number: int) -> None:
        installation = self._installation(server)
        text = long_text(self._arguments.tokens - TEMPLATE_TOKENS, folder=self._model, seed=f"{number}")
        with tempfile.TemporaryDirectory(dir=self._work) as home:
            work = Path(home)
            flags = tuple(flag.format(disk=work / "disk") for flag in FLAGS.get(server.name, ()))
            with running(server, installation, model=self._model, work=work, flags=flags) as served:
                self._warm_up(served)
                self._time(server, "cold", served, messages(text, "What is it about?"))
                self._time(server, "repeat", served, messages(text, "What is it about?"))
                self._time(server, "other end", served, messages(text, "Name the tenth word of it, please."))
                wait_written(work / "disk")
            if server.name not in FLAGS:
                return
            with running(server, installation, model=self._model, work=work, flags=flags) as served:
                self._warm_up(served)
                self._time(server, "restart", served, messages(text, "What is it about?"))

    def _installation(self, server: Server) -> Installation:
        if server.name == OURS:
            return Installation(Path(sys.executable), is_foreign=False)
        given = self._arguments
        return install(server, given.environments, uv=find_uv(), backend=given.backend)

    def _warm_up(self, served: Served) -> None:
        """What every process does once is not measured."""
        ask(served, messages("nothing of interest", "Say something else."))

    def _time(self, server: Server, case: str, served: Served, conversation: list[dict[str, str]]) -> None:
        answered = ask(served, conversation)
        self.seconds.setdefault(server.name, {}).setdefault(case, []).append(answered.ttft_s)
        self.tokens.setdefault(server.name, {})[case] = (answered.num_cached, answered.num_prompt)
        say(f"{server.name}: {case}: {answered.ttft_s:.3f} s, {answered.num_cached} of {answered.num_prompt} cached")
