"""A real `vllm-mlx serve` process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 300.0
IDLE_TIMEOUT_S = 240.0


class Served:
    """Starts at once and waits for the banner. A context manager: the process is gone afterwards."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "vllm_mlx.cli.main", "serve", *arguments, "--port", "0"]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.banner = self._read_banner()
        found = re.search(r"http://\S+/v1", self.banner)
        if found is None:
            self._process.kill()
            raise AssertionError(f"the server did not start:\n{log.read_text()}")
        self.url = found[0].removesuffix("/v1")

    @property
    def port(self) -> str:
        """The port that was chosen."""
        return self.url.rpartition(":")[2]

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    @property
    def errors(self) -> str:
        """What it wrote to standard error so far."""
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code."""
        return self._process.wait(timeout_s)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read_banner(self) -> str:
        """Standard output up to the end of the command to paste; what there is, if the process ends before."""
        assert self._process.stdout is not None
        timer = threading.Timer(START_TIMEOUT_S, self._process.kill)
        timer.start()
        lines: list[str] = []
        for line in self._process.stdout:
            lines.append(line)
            if line.lstrip().startswith("-d "):
                break
        timer.cancel()
        return "".join(lines)


def wait_until_idle(server: Served) -> dict[str, float]:
    """All gauges and counters, labels summed up (also per endpoint), once nothing runs or waits."""
    for _ in range(int(IDLE_TIMEOUT_S / 0.2)):
        text = httpx.get(f"{server.url}/metrics").text
        values: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] += sample.value
                if endpoint := sample.labels.get("endpoint"):
                    values[f"{sample.name} {endpoint}"] += sample.value
        if values["vllm_mlx_requests_running"] == values["vllm_mlx_requests_waiting"] == 0:
            return values
        time.sleep(0.2)
    raise AssertionError("the server did not become idle")


def engine_pid(server: Served) -> int:
    """The engine's process: the child of the server that runs it."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"vllm_mlx.cli.engine" in Path(f"/proc/{pid}/cmdline").read_bytes())


def resident_kib(pid: int) -> int:
    """Memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])
