"""A coding agent's conversation: time to the first token of its long first prompt, and of the turns that follow.

    python benchmarks/agent_turns.py [--model FOLDER] [--tokens 20000] [--turns 3] [--rounds 2] [--peers mlx-lm]
        [--python PATH] [--output results.json] [-- --max-num-seqs 4 ...]

Ours is asked through `/v1/messages` as Claude Code asks (a system block and the last message marked `cache_control`),
peers through `/v1/chat/completions`. Each turn adds what the server answered and a tool's result of `--result` tokens.
Every round starts both servers anew, has prompts of its own, and is preceded by a conversation of the same lengths that
is not told, and by a rest, so that nothing is compiled while it is measured. `--python` names an interpreter that has
the peers; without it they are installed. What follows `--` are flags of our server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from prefix_servers import Answered, Served, ask, events, long_text, running  # noqa: E402
from run import find_uv, say  # noqa: E402
from servers import OURS, SERVERS, Installation, Unusable, install  # noqa: E402
from serving import float32_demo  # noqa: E402

from vllm_mlx.core.config import Config  # noqa: E402

MAX_TOKENS = 32
Conversation = list[dict[str, Any]]
Ask = Callable[[Served, Conversation], Answered]
MARK = {"cache_control": {"type": "ephemeral"}}


def ask_messages(served: Served, conversation: Conversation) -> Answered:
    """The same conversation through Anthropic's API.

    Our stream begins with the first token. Its first text may come later, or never: white space alone begins no block,
    and models with random weights say little else.
    """
    system, *others = conversation
    *before, last = others
    body = {
        "model": served.model,
        "system": [{"type": "text", "text": system["content"], **MARK}],
        "messages": [*before, {**last, "content": [{"type": "text", "text": last["content"], **MARK}]}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0,
        "stream": True,
    }
    begun, first, usage, text = time.perf_counter(), None, {}, ""
    with served.client.stream("POST", f"{served.url}/v1/messages", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise Unusable(f"answered {response.status_code}: {response.read().decode(errors='replace')[:400]}")
        for event in events(response):
            if event["type"] == "error":
                raise Unusable(f"failed: {event['error']}")
            if event["type"] == "message_start":
                usage, first = event["message"]["usage"], time.perf_counter() - begun
            text += event.get("delta", {}).get("text", "")
    if first is None:
        raise Unusable("ended without an answer")
    num_cached = usage["cache_read_input_tokens"]
    return Answered(first, usage["input_tokens"] + num_cached + usage["cache_creation_input_tokens"], num_cached, text)


def ask_chat(served: Served, conversation: Conversation) -> Answered:
    """Through OpenAI's."""
    return ask(served, conversation, max_tokens=MAX_TOKENS)


def converse(served: Served, asked: Ask, given: argparse.Namespace, *, seed: str) -> list[Answered]:
    """One conversation, turn by turn."""
    prompt = long_text(given.tokens, folder=given.model, seed=seed)
    conversation = [
        {"role": "system", "content": f"Notes: {prompt}"},
        {"role": "user", "content": "Mend the failing test."},
    ]
    answers: list[Answered] = []
    for number in range(given.turns):
        answer = asked(served, conversation)
        answers.append(answer)
        result = long_text(given.result, folder=given.model, seed=f"{seed} {number}")
        conversation += [
            {"role": "assistant", "content": answer.text or "Very well."},
            {"role": "user", "content": f"The tool says: {result}"},
        ]
    return answers


def measure(name: str, given: argparse.Namespace, number: int, work: Path) -> list[Answered]:
    """One round of one server. Raises Unusable."""
    server, flags = SERVERS[name], tuple(given.flags) if name == OURS else ()
    if name == OURS or given.python is not None:
        installation = Installation(Path(sys.executable) if name == OURS else given.python, is_foreign=False)
    else:
        installation = install(server, given.environments, uv=find_uv(), backend=given.backend)
    asked: Ask = ask_messages if name == OURS else ask_chat
    with (
        tempfile.TemporaryDirectory(dir=work) as home,
        running(server, installation, model=given.model, work=Path(home), flags=flags) as served,
    ):
        converse(served, asked, given, seed=f"warm-up {number}")
        time.sleep(given.rest_s)
        answers = converse(served, asked, given, seed=f"round {number}")
    for turn, answer in enumerate(answers, 1):
        say(f"{name}: turn {turn}: {answer.ttft_s:.3f} s, {answer.num_cached} of {answer.num_prompt} cached")
    return answers


def table(found: dict[str, list[list[Answered]]], turns: int) -> str:
    """Medians of the rounds, and ours as a share of each peer's."""
    lines = ["| server | " + " | ".join(f"turn {turn + 1}, ms | cached" for turn in range(turns)) + " |"]
    lines.append("| --- |" + " --- | --- |" * turns)

    def median_ms(name: str, turn: int) -> float:
        return 1000 * statistics.median(answers[turn].ttft_s for answers in found[name])

    for name, rounds in found.items():
        cells = []
        for turn in range(turns):
            share = f" ({median_ms(OURS, turn) / median_ms(name, turn):.2f}x)" if name != OURS and OURS in found else ""
            last = rounds[-1][turn]
            cells.append(f"{median_ms(name, turn):.0f}{share} | {last.num_cached} of {last.num_prompt}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; without it, the demo model in float32")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the first prompt")
    parser.add_argument("--result", type=int, default=200, help="tokens of what the tool says each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rest-s", type=float, default=30, help="after the warm-up, for what servers do in idle time")
    parser.add_argument("--peers", type=lambda text: [p for p in text.split(",") if p], default=["mlx-lm"])
    parser.add_argument("--python", type=Path, help="an interpreter that has the peers; nothing is installed")
    parser.add_argument("--environments", type=Path, default=Config().cache_path / "peers", help="where peers are kept")
    on_linux = "cpu" if sys.platform == "linux" else None
    parser.add_argument("--backend", default=on_linux, help="MLX's extra to install: cpu, cuda12, cuda13")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(own)
    given.flags, given.model = list(flags), given.model or float32_demo()
    found: dict[str, list[list[Answered]]] = {}
    with tempfile.TemporaryDirectory() as work:
        for number in range(given.rounds):
            for name in (OURS, *given.peers):
                try:
                    found.setdefault(name, []).append(measure(name, given, number, Path(work)))
                except (Unusable, httpx.HTTPError) as error:
                    say(f"{name}: {error}")
    found = {name: rounds for name, rounds in found.items() if rounds}
    print(table(found, given.turns))
    if given.output is not None:
        figures = {name: [[vars(answer) for answer in answers] for answers in rounds] for name, rounds in found.items()}
        given.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
