"""What the server costs besides its engine: requests over HTTP against a runner that computes nothing.

    python benchmarks/http_cost.py [--clients 64] [--step-ms 8] [--max-tokens 128] [--num-requests 256] [-- FLAGS]

The engine process has the scheduler and `FakeRunner`, whose steps take `--step-ms`; the server has the demo model's
tokenizer and template. Printed: tokens/s against what steps of that length allow, and the CPU time that the server's
process takes per output token. FLAGS are those of `vllm-mlx serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEP_S = "HTTP_COST_STEP_S"
START_TIMEOUT_S = 60


def run_engine(folder: str) -> int:
    """The engine process."""
    from vllm_mlx.cli.compose import read_child_environment
    from vllm_mlx.engine.child import run_child
    from vllm_mlx.testing.fake import FakeRunner

    _, config = read_child_environment()
    step_s = float(os.environ[STEP_S])

    def make_runner(_: object) -> FakeRunner:
        return FakeRunner(script=lambda ids: 1000 + len(ids) % 20_000, vocab_size=49_152, num_pages=8192, step_s=step_s)

    return run_child(folder, factory=make_runner, config=config)


def run_server(flags: Sequence[str]) -> int:
    """The server process, with that engine."""
    from vllm_mlx.cli import compose
    from vllm_mlx.cli.main import main

    compose.CHILD_COMMAND = (sys.executable, __file__, "--engine")
    return main(["serve", "demo", *flags])


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_ready(url: str) -> None:
    """Until the server takes requests."""
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"{url}/readyz").close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit("the server does not start")


def measure(args: argparse.Namespace, flags: Sequence[str], port: int) -> None:
    """Start the server, load it, and print what it took."""
    environment = os.environ | {STEP_S: str(args.step_ms / 1000)}
    command = [sys.executable, __file__, "--server", "--port", str(port), "--log-level", "warning", *flags]
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, env=environment) as server:
        try:
            url, output = f"http://127.0.0.1:{port}", Path(folder) / "load.json"
            wait_ready(url)
            load = [sys.executable, "-m", "vllm_mlx.cli.main", "bench-serve", "--url", url]
            load += ["--prompt-words", "100", "--max-tokens", str(args.max_tokens), "--ignore-eos"]
            load += ["--concurrency", str(args.clients), "--num-requests", str(args.num_requests)]
            load += ["--repetitions", "1", "--warmup", "0", "--format", "json", "--output", str(output)]
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            before = cpu_s(server.pid)
            subprocess.run(load, check=True, **quiet)
            spent = cpu_s(server.pid) - before
            row = json.loads(output.read_text())["rows"][0]
            most = args.clients / args.step_ms * 1000
            print(f"{row['throughput_tps']:.0f} tokens/s over HTTP; steps alone allow {most:.0f}")
            print(f"TTFT p50 {row['ttft_ms_p50']:.0f} ms, p95 {row['ttft_ms_p95']:.0f} ms; failures: {row['failures']}")
            print(f"the server's process: {spent / args.num_requests / args.max_tokens * 1e6:.0f} us CPU a token")
        finally:
            server.send_signal(signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    """Arguments before `--` are ours."""
    if argv[:1] == ["--engine"]:
        return run_engine(argv[1])
    if argv[:1] == ["--server"]:
        return run_server(argv[1:])
    own, flags = (list(argv[: argv.index("--")]), argv[argv.index("--") + 1 :]) if "--" in argv else (list(argv), [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--port", type=int, default=8467)
    args = parser.parse_args(own)
    measure(args, flags, args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
