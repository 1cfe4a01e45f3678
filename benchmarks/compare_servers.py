"""Our server against `mlx_lm.server`, side by side: tokens per second, time to first token, overhead.

    python benchmarks/compare_servers.py [--rounds 5] [--tokens 64] [--output results.json]

Both servers hold the same float32 folder of the demo model, both processes have the same BLAS preloaded, and the rounds
alternate (ours, theirs, ours, ...), so that a noisy machine is noisy for both. What counts are the ratios of
neighbouring rounds. Every request starts with words of its own, so that no server answers from a prompt cache. The bare
loops (`bare_loop.py`: our runner without scheduler, IPC and HTTP; mlx-lm's `generate_step`) alternate with them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from serving import environment, float32_demo, started

HERE = Path(__file__).parent
TOPICS = ("the sea", "a lost key", "winter", "a clockmaker", "two dogs", "the moon", "a garden", "an old map")


@dataclass(frozen=True)
class Server:
    """One server under test."""

    name: str
    url: str
    model: str


@dataclass(frozen=True)
class Scenario:
    """How many clients at once, and at which temperatures."""

    name: str
    clients: int
    kind: str

    def temperature(self, number: int, client: int) -> float:
        """Greedy; one per client, the same in every round; or one per request, never seen before."""
        match self.kind:
            case "repeated":
                return 0.5 + 0.1 * client
            case "fresh":
                return 0.5 + 0.1 * client + 0.0001 * (number % 1000)
        return 0.0


SCENARIOS = (
    Scenario("1 client, greedy", 1, "greedy"),
    Scenario("8 clients, a temperature each", 8, "repeated"),
    Scenario("8 clients, temperatures not seen before", 8, "fresh"),
)


@dataclass(frozen=True)
class Round:
    """What one round of requests gave."""

    tokens_per_s: float
    ttft_s: float
    """Mean over the clients."""


async def wait_ready(server: Server, client: httpx.AsyncClient) -> None:
    """Ask until there is an answer."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError, httpx.HTTPStatusError):
            await one_request(server, client, body(server, 0, 0, 2))
            return
        await asyncio.sleep(0.5)
    raise SystemExit(f"{server.name} did not start")


def body(server: Server, number: int, client: int, num_tokens: int, *, temperature: float = 0.0) -> dict[str, Any]:
    """A request of about 40 prompt tokens, unlike any other from its first words on."""
    return {
        "model": server.model,
        "messages": [
            {"role": "system", "content": f"{number}-{client}: you tell long stories."},
            {"role": "user", "content": f"Write a very long story about {TOPICS[(number + client) % len(TOPICS)]}."},
        ],
        "max_tokens": num_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a stream."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


async def one_request(server: Server, client: httpx.AsyncClient, request: dict[str, Any]) -> tuple[int, float]:
    """Tokens generated and time to first token of one request."""
    begun, first, num_tokens = time.perf_counter(), None, 0
    async with client.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response:
        response.raise_for_status()
        async for event in events(response):
            if any(choice["delta"].get("content") for choice in event["choices"]) and first is None:
                first = time.perf_counter() - begun
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    assert first is not None, "an answer without text"
    return num_tokens, first


async def run_round(server: Server, client: httpx.AsyncClient, number: int, scenario: Scenario, tokens: int) -> Round:
    """All clients at once."""
    requests = [
        body(server, number, i, tokens, temperature=scenario.temperature(number, i)) for i in range(scenario.clients)
    ]
    begun = time.perf_counter()
    results = await asyncio.gather(*(one_request(server, client, request) for request in requests))
    elapsed = time.perf_counter() - begun
    return Round(sum(n for n, _ in results) / elapsed, statistics.mean(first for _, first in results))


class BareLoop:
    """A process that decodes without a server when told to."""

    def __init__(self, kind: str, folder: Path) -> None:
        command = [sys.executable, str(HERE / "bare_loop.py"), kind, str(folder)]
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def run(self, num_tokens: int) -> float:
        """Seconds per decoded token."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num_tokens}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


async def decode_seconds(server: Server, client: httpx.AsyncClient, number: int, num_tokens: int) -> float:
    """Seconds per token after the first, of one streamed request."""
    begun = time.perf_counter()
    tokens, first = await one_request(server, client, body(server, number, 0, num_tokens))
    return (time.perf_counter() - begun - first) / (tokens - 1)


def summary(ours: list[Round], theirs: list[Round]) -> dict[str, float]:
    """Medians, and the medians of neighbouring rounds' ratios."""
    return {
        "ours_tokens_per_s": statistics.median(r.tokens_per_s for r in ours),
        "theirs_tokens_per_s": statistics.median(r.tokens_per_s for r in theirs),
        "throughput_ratio": statistics.median(
            a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True)
        ),
        "ours_ttft_s": statistics.median(r.ttft_s for r in ours),
        "theirs_ttft_s": statistics.median(r.ttft_s for r in theirs),
        "ttft_ratio": statistics.median(a.ttft_s / b.ttft_s for a, b in zip(ours, theirs, strict=True)),
    }


async def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    ours = Server("vllm-mlx", f"http://127.0.0.1:{arguments.port}", "default")
    theirs = Server("mlx_lm.server", f"http://127.0.0.1:{arguments.port + 1}", str(folder))
    results: dict[str, Any] = {}
    our_command = [sys.executable, "-m", "vllm_mlx.cli.main", "serve", str(folder), "--port", str(arguments.port)]
    their_command = [
        sys.executable,
        "-m",
        "mlx_lm",
        "server",
        "--model",
        str(folder),
        "--port",
        str(arguments.port + 1),
    ]
    with started(our_command), started(their_command):
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=64)) as client:
            for server in (ours, theirs):
                await wait_ready(server, client)
            for base, scenario in enumerate(SCENARIOS[arguments.first :], start=1):
                rounds: dict[str, list[Round]] = {ours.name: [], theirs.name: []}
                for number in range(arguments.rounds + 1):
                    for server in (ours, theirs):
                        found = await run_round(server, client, 1000 * base + number, scenario, arguments.tokens)
                        rounds[server.name].append(found)
                        speed, first = f"{found.tokens_per_s:.2f} tok/s", f"first token {found.ttft_s:.3f} s"
                        print(f"{scenario.name}: {server.name}: {speed}, {first}", flush=True)
                # the first round warms both up
                results[scenario.name] = summary(rounds[ours.name][1:], rounds[theirs.name][1:])
            results["one client against bare loops"] = await overhead(ours, client, folder, arguments)
    return results


async def overhead(
    ours: Server, client: httpx.AsyncClient, folder: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """Seconds per token through HTTP over our bare runner's and over mlx-lm's own loop."""
    bare, library = BareLoop("runner", folder), BareLoop("mlx_lm", folder)
    try:
        rows = []
        for number in range(arguments.rounds + 1):
            served = await decode_seconds(ours, client, 9000 + number, arguments.tokens)
            rows.append((served, bare.run(arguments.tokens), library.run(arguments.tokens)))
            print("per token: server {:.1f} ms, bare runner {:.1f} ms, mlx-lm loop {:.1f} ms".format(
                *(1000 * value for value in rows[-1])), flush=True)  # fmt: skip
    finally:
        bare.close()
        library.close()
    rows = rows[1:]
    return {
        "server_over_bare_runner": statistics.median(served / b for served, b, _ in rows),
        "server_over_mlx_lm_loop": statistics.median(served / m for served, _, m in rows),
        "bare_runner_over_mlx_lm_loop": statistics.median(b / m for _, b, m in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--first", type=int, default=0, help="leave out the scenarios before this one")
    parser.add_argument("--port", type=int, default=8410)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(compare(float32_demo(), arguments))
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
