"""What `bench-serve` itself costs: its client against a server that only streams.

    python benchmarks/client_cost.py [--streams 64] [--tokens 500] [--rate 100]

The server is a process of its own. First it sends `--rate` events a second on every stream, each in a write of its
own, as a language model's server does; then as fast as the client takes them. Printed: the client's CPU time per event,
which part of a core that is, and how evenly the paced events were seen to come.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

from vllm_mlx.bench.client import ChatClient
from vllm_mlx.bench.http import HttpClient, parse_origin
from vllm_mlx.bench.load import Load, LoadResult, run_load
from vllm_mlx.bench.sample import Sample
from vllm_mlx.bench.stats import summarize

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def frame(value: object) -> bytes:
    """One event, as one piece of a chunked body."""
    data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = frame(
    {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "any",
        "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}],
    }
)
END = frame({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}) + frame(b"[DONE]") + b"0\r\n\r\n"


class Streams:
    """Answers every request with `tokens` events: paced for all streams together, or at once."""

    def __init__(self, tokens: int, rate: float | None) -> None:
        self._tokens = tokens
        self._rate = rate
        self._open: dict[asyncio.StreamWriter, int] = {}

    async def serve(self, pipe: Connection) -> None:
        """Until the process is ended; the port goes through the pipe."""
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        if self._rate is None:
            await server.serve_forever()
            return
        due = time.perf_counter()
        while True:
            due += 1 / self._rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            for writer in list(self._open):
                self._send(writer)

    def _send(self, writer: asyncio.StreamWriter) -> None:
        writer.write(TOKEN)
        self._open[writer] -= 1
        if not self._open[writer]:
            del self._open[writer]
            writer.write(END)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        await reader.readexactly(length)
        writer.write(HEAD)
        if self._rate is not None:
            self._open[writer] = self._tokens
            return
        for _ in range(self._tokens):
            writer.write(TOKEN)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(END)


def serve(pipe: Connection, tokens: int, rate: float | None) -> None:
    """The server's process."""
    asyncio.run(Streams(tokens, rate).serve(pipe))


async def load(port: int, streams: int) -> tuple[list[Sample], float, float]:
    """All streams at once: samples, wall time and the client's CPU time, in seconds."""
    client = ChatClient(HttpClient(parse_origin(f"http://127.0.0.1:{port}")), model="any")
    result, begun = LoadResult(), time.process_time()
    await run_load(
        [b'{"stream": true}'] * streams,
        Load(streams),
        send=lambda body, origin_s: client.send(body, origin_s=origin_s),
        result=result,
        on_done=lambda _: None,
    )
    return result.samples, result.wall_s, time.process_time() - begun


def measure(name: str, streams: int, tokens: int, rate: float | None) -> None:
    """One server, one load, one line."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(theirs, tokens, rate), daemon=True)
    process.start()
    try:
        samples, wall_s, cpu_s = asyncio.run(load(ours.recv(), streams))
    finally:
        process.kill()
        process.join()
    assert all(sample.is_ok and sample.num_chunks == tokens for sample in samples), "an answer is not whole"
    events = streams * tokens
    gaps = summarize([1000 * gap for sample in samples for gap in sample.gaps_s])
    assert gaps is not None
    print(
        f"{name}: {events / wall_s:,.0f} events/s, {1e6 * cpu_s / events:.1f} µs of CPU per event,"
        f" {cpu_s / wall_s:.0%} of a core; gaps median {gaps.p50:.1f} ms, p99 {gaps.p99:.1f} ms;"
        f" first event after {1000 * statistics.mean(s.ttft_s or 0.0 for s in samples):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rate", type=float, default=100.0)
    arguments = parser.parse_args()
    streams, tokens = arguments.streams, arguments.tokens
    measure(f"{streams} streams at {arguments.rate:g} events/s", streams, tokens, arguments.rate)
    measure(f"{streams} streams as fast as they go", streams, tokens, None)


if __name__ == "__main__":
    main()
