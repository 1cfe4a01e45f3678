"""Traffic for soak tests: questions whose answers are known, and a server that is killed while they are asked."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
from served import Served, engine_pid

WAIT_S = 240.0
"""A request that takes longer hangs."""
MIN_GAP = 2e-4
"""Between the two likeliest tokens' log-probabilities: sums in another order cannot make the second the first."""
WINDOW = 24
"""Questions that are asked in the same days, so to speak; the older ones come back now and then."""
WORDS = ("sea", "stone", "lamp", "river", "cloud", "bread", "letter", "horse", "window", "garden", "north", "silver")


class Script(NamedTuple):
    """What is said to the model in a conversation."""

    system: str
    turns: tuple[str, ...]


class Question(NamedTuple):
    """A conversation so far, and what a server without any cache answers greedily."""

    messages: tuple[dict[str, str], ...]
    max_tokens: int
    answer: str


def scripts(seed: int, *, count: int) -> list[Script]:
    """Chats that grow, single questions behind system texts that many share, short ones, and long ones."""
    draw = random.Random(f"scripts {seed}")

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    systems = [text(40, 120) for _ in range(5)]
    kinds: dict[str, Callable[[], Script]] = {
        "chat": lambda: Script(draw.choice(systems), tuple(text(5, 40) for _ in range(5))),
        "shared": lambda: Script(draw.choice(systems), (text(3, 60),)),
        "short": lambda: Script("", (text(1, 4),)),
        "long": lambda: Script("", (text(300, 900),)),
    }
    return [kinds[kind]() for kind in draw.choices(list(kinds), weights=[4, 3, 2, 1], k=count)]


def answered(client: openai.OpenAI, script: Script, *, seed: int) -> list[Question]:
    """The questions of a script, each behind the answers to those before. An answer ends before its first near-tie."""
    draw = random.Random(f"{seed} {script}")
    messages = ({"role": "system", "content": script.system},) if script.system else ()
    questions: list[Question] = []
    for turn in script.turns:
        messages += ({"role": "user", "content": turn},)
        question = _without_ties(client, messages, draw.randint(4, 20))
        if question is None:
            break
        questions.append(question)
        messages += ({"role": "assistant", "content": question.answer},)
    return questions


def _without_ties(client: openai.OpenAI, messages: tuple[Any, ...], max_tokens: int) -> Question | None:
    while max_tokens > 0:
        [choice] = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=max_tokens, temperature=0, logprobs=True, top_logprobs=2
        ).choices
        best = [token.top_logprobs for token in choice.logprobs.content]
        ties = [i for i, (first, second) in enumerate(best) if first.logprob - second.logprob < MIN_GAP]
        if not ties:
            return Question(messages, max_tokens, choice.message.content or "")
        max_tokens = ties[0]
    return None


class Service:
    """The server that clients talk to: another one after it was killed. A context manager."""

    def __init__(self, start: Callable[[int], Served]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self.servers: list[Served] = []
        """All of them, the one that runs now last."""
        self.num_retries = 0
        """Requests that lost their server."""
        self._open()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self.servers[-1].__exit__()

    @property
    def server(self) -> Served:
        """The one that runs now."""
        return self.servers[-1]

    def stats(self) -> dict[str, Any]:
        """Answer of /v1/cache/stats."""
        found: dict[str, Any] = httpx.get(f"{self.server.url}/v1/cache/stats").json()
        return found

    def ask(self, number: int, questions: list[Question], *, of: int, seed: int) -> None:
        """Ask the request of that `number`, again if its server is killed. Raises AssertionError at a wrong answer."""
        while True:
            with self._lock:
                client = self._client
            try:
                ask(client, number, questions, of=of, seed=seed)
            except (openai.APIConnectionError, httpx.TransportError):
                with self._lock:
                    if client is self._client:
                        raise
                    self.num_retries += 1
            else:
                return

    def kill_engine(self) -> None:
        """Kill the engine, while it computes."""
        os.kill(_await_engine(self.server), signal.SIGKILL)

    def kill_server(self) -> None:
        """Kill the server, see that its engine goes too, and start another."""
        with self._lock:
            engine = _await_engine(self.server)
            self.server.signal(signal.SIGKILL)
            self.server.wait()
            self._client.close()
            self.server.__exit__()
            _await(lambda: not Path(f"/proc/{engine}").exists(), "the engine outlives its server")
            self._open()

    def _open(self) -> None:
        self.servers.append(self._start(len(self.servers)))
        url = f"{self.server.url}/v1"
        self._client = openai.OpenAI(base_url=url, api_key="none", timeout=WAIT_S, max_retries=0)


def ask(client: openai.OpenAI, number: int, questions: list[Question], *, of: int, seed: int) -> None:
    """One request, in its entirety decided by its number: every seventh is given up while it streams."""
    draw = random.Random(f"{seed} {number}")
    newest = max(1, (number + 1) * len(questions) // of)
    oldest = 0 if draw.random() < 0.15 else max(0, newest - WINDOW)
    question = questions[draw.randrange(oldest, newest)]
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": _marked(question.messages) if draw.random() < 0.3 else question.messages,
        "max_tokens": question.max_tokens,
        "temperature": 0,
    }
    if number % 7 == 0:
        text = _streamed(client, request, most=draw.randrange(question.max_tokens))
        assert question.answer.startswith(text), f"request {number}: {text!r}, not {question.answer!r}"
    elif number % 5 == 0:
        choices = client.chat.completions.create(**request, n=2).choices
        assert [choice.message.content for choice in choices] == [question.answer] * 2, f"request {number}"
    else:
        text = _streamed(client, request)
        assert text == question.answer, f"request {number}: {text!r}, not {question.answer!r}"


def _marked(messages: tuple[dict[str, str], ...]) -> list[dict[str, Any]]:
    """The same conversation with a breakpoint behind its first message."""
    first, *others = messages
    part = {"type": "text", "text": first["content"], "cache_control": {"type": "ephemeral"}}
    return [{**first, "content": [part]}, *others]


def _streamed(client: openai.OpenAI, request: dict[str, Any], *, most: int | None = None) -> str:
    """The text of a stream; given up after `most` pieces."""
    text = ""
    with client.chat.completions.create(**request, stream=True) as chunks:
        for index, chunk in enumerate(chunks):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            if index == most:
                break
    return text


def _await_engine(server: Served) -> int:
    """The engine's process, which may just be starting."""
    found: list[int] = []

    def is_there() -> bool:
        try:
            found.append(engine_pid(server))
        except (StopIteration, OSError):
            return False
        return True

    _await(is_there, "there is no engine")
    return found[0]


def _await(holds: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, problem
        time.sleep(0.05)
