"""A server that a command starts for itself, and stops when it is done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from vllm_mlx.cli.settings import ENV_PREFIX, arguments_of
from vllm_mlx.cli.target import NoServer, is_ready
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import EngineStartError

_LOOK_EVERY_S = 0.2
_STOP_S = 60.0
"""A server that takes longer to stop is killed."""


class OwnServer:
    """Runs `vllm-mlx serve` with these settings, its log in `log`. A context manager: it is gone afterwards.

    It is a session of its own, so that Ctrl-C reaches the client in the terminal only.
    """

    def __init__(self, config: Config, *, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "vllm_mlx.cli.main", "serve", *arguments_of(config)]
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=_environment(config),
                start_new_session=True,
            )

    def __enter__(self) -> OwnServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_ready(self, url: str) -> None:
        """Wait until it takes requests; downloads and conversions may take long. Raises EngineStartError."""
        with self._log.open("r", errors="replace") as told:
            while not self._is_ready(url):
                print(told.read(), end="", file=sys.stderr, flush=True)
                if self._process.poll() is not None:
                    print(told.read(), end="", file=sys.stderr, flush=True)
                    code = self._process.returncode
                    raise EngineStartError(f"the server ended before it was ready, with code {code}")
                time.sleep(_LOOK_EVERY_S)

    @staticmethod
    def _is_ready(url: str) -> bool:
        try:
            return is_ready(url)
        except NoServer:
            return False


def _environment(config: Config) -> dict[str, str]:
    """Ours without settings, which the command line says already, but with the key."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return kept if config.api_key is None else {**kept, f"{ENV_PREFIX}API_KEY": config.api_key}
