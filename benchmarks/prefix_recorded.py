"""Conversations of coding agents as they were recorded, replayed turn by turn against our server.

Turns that were recorded go first; then the conversation grows: the server's own answer, and what the tool said in the
last recorded turn. Tools are not taken by the chat API yet: their JSON goes into the system text, so that sizes are
real; so do the system blocks of `/v1/messages`, and its content blocks become text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import tokenizers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from prefix_servers import PATIENT, Served, ask, running  # noqa: E402
from run import say  # noqa: E402
from servers import OURS, SERVERS, Installation, Unusable  # noqa: E402

CLIENTS = ("pi-local", "cn", "opencode", "claude-code")
TURNS = 5
MAX_TOKENS = 24
ROOM_TOKENS = 1000
"""What the turns after the recorded ones may add."""
LONG_CONTEXT = 131_072


class Turn(msgspec.Struct, frozen=True):
    """One request of a replayed conversation."""

    client: str
    model: str
    number: int
    is_recorded: bool
    num_prompt: int
    num_cached: int
    num_shared: int
    """Tokens that an earlier prompt or answer begins with too: more could not be found."""
    ttft_s: float
    reason: str
    message: str
    differs: str | None
    """The text at which it parts from the earlier prompt."""

    @property
    def percent(self) -> float:
        """Of the prompt's tokens, those that came from the cache."""
        return 100 * self.num_cached / self.num_prompt


def recorded_turns(folder: Path) -> list[list[dict[str, Any]]]:
    """The messages of each request that offers tools, in order; others ask for titles and the like."""
    bodies = [json.loads(path.read_text())["body"] for path in sorted(folder.glob("*.json"))]
    return [plain_messages(body) for body in bodies if isinstance(body, dict) and body.get("tools")]


def plain_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a chat body without tools; system text and tools are the first message."""
    given = [_plain(message) for message in body["messages"]]
    system = [_text(body["system"], None)] if body.get("system") else []
    if given[0]["role"] == "system":
        system.append(given.pop(0)["content"])
    tools = json.dumps(body["tools"], indent=None) if body.get("tools") else ""
    return [{"role": "system", "content": "\n\n".join([*system, tools])}, *given]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    kept = {name: message[name] for name in ("role", "tool_call_id") if name in message}
    return {**kept, "content": _text(message.get("content"), message.get("tool_calls"))}


def _text(content: Any, calls: Any) -> str:
    """Blocks as text: what a tool was asked and what it said as JSON."""
    if isinstance(content, list):
        content = "\n".join(part["text"] if part.get("type") == "text" else json.dumps(part) for part in content)
    return "\n".join(filter(None, [content, json.dumps(calls) if calls else None]))


class Replay:
    """Replays conversations with the model if its context is long enough, else with a small random one."""

    def __init__(self, *, model: Path, work: Path) -> None:
        self._model = model
        self._work = work
        self._tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
        self._context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
        self.turns: list[Turn] = []

    def run(self, folder: Path, clients: Sequence[str]) -> None:
        """All clients, each with a server of its own."""
        for client in clients:
            turns = recorded_turns(folder / client)
            if not turns:
                say(f"{client}: nothing recorded in {folder / client}")
                continue
            num_tokens = len(self._tokenizer.encode(json.dumps(turns[-1])).ids)
            fits = num_tokens + ROOM_TOKENS <= self._context
            model = self._model if fits else self._long_model()
            installation = Installation(Path(sys.executable), is_foreign=False)
            with running(SERVERS[OURS], installation, model=model, work=self._work, flags=PATIENT) as served:
                self._replay(client, turns, served, model)

    def _replay(self, client: str, recorded: list[list[dict[str, Any]]], served: Served, model: Path) -> None:
        conversation, said = recorded[-1], ""
        for number in range(max(TURNS, len(recorded))):
            is_recorded = number < len(recorded)
            if is_recorded:
                conversation = recorded[number]
            else:
                tool = {**recorded[-1][-1], "content": f"{number}: {recorded[-1][-1]['content']}"}
                conversation = [*conversation, {"role": "assistant", "content": said}, tool]
            why = _explain(served, conversation)
            answered = ask(served, conversation, max_tokens=MAX_TOKENS)
            said = answered.text
            turn = Turn(
                client=client,
                model=model.name,
                number=number + 1,
                is_recorded=is_recorded,
                num_prompt=answered.num_prompt,
                num_cached=answered.num_cached or 0,
                num_shared=why["seen_tokens"],
                ttft_s=answered.ttft_s,
                reason=why["reason"],
                message=why["message"],
                differs=(why["difference"] or {}).get("given"),
            )
            self.turns.append(turn)
            say(f"{client}, turn {turn.number}: {turn.num_cached} of {turn.num_prompt} cached; {turn.message}")

    def _long_model(self) -> Path:
        """A tiny model of random weights with the same tokenizer and a long context."""
        from random_model import COMMON, SHAPES, copy_tokenizer, write

        folder = self._work / "tiny-random"
        if not folder.exists():
            vocab_size = json.loads((self._model / "config.json").read_text())["vocab_size"]
            config = {**COMMON, **SHAPES["tiny"], "vocab_size": vocab_size, "max_position_embeddings": LONG_CONTEXT}
            write(folder, config)
            copy_tokenizer(str(self._model), folder)
        return folder


def _explain(served: Served, conversation: list[dict[str, Any]]) -> dict[str, Any]:
    """What the server would find, and why no more."""
    body = {"model": served.model, "messages": conversation}
    response = served.client.post(f"{served.url}/v1/cache/explain", json=body)
    if response.status_code != httpx.codes.OK:
        raise Unusable(f"answered {response.status_code}: {response.text[:400]}")
    answer: dict[str, Any] = response.json()
    return answer


def recorded_table(turns: Sequence[Turn]) -> str:
    """Markdown: a line for each turn."""
    head = ("client", "model", "turn", "prompt", "cached", "of the prompt", "of what was seen", "first token", "why")
    rows = [head, tuple("---" for _ in head), *map(_row, turns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(turn: Turn) -> tuple[str, ...]:
    seen = f"{100 * turn.num_cached / turn.num_shared:.1f} %" if turn.num_shared else ""
    kind = "recorded" if turn.is_recorded else "grown"
    return (
        turn.client,
        turn.model,
        f"{turn.number}, {kind}",
        f"{turn.num_prompt:,}",
        f"{turn.num_cached:,}",
        f"**{turn.percent:.1f} %**",
        seen,
        f"{1000 * turn.ttft_s:,.0f} ms",
        turn.reason,
    )
