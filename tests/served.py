"""A real `vllm-mlx serve` process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

START_TIMEOUT_S = 300.0


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
