"""What benchmarks of servers share: the float32 folder of the demo model, the environment, and server processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vllm_mlx.core.config import Config
from vllm_mlx.runner import blas

STOP_TIMEOUT_S = 30
EXPAND = """
import sys
from mlx_lm.convert import convert
convert(sys.argv[1], sys.argv[2], dequantize=True, dtype="float32")
"""


def environment() -> dict[str, str]:
    """Ours, with the fast BLAS preloaded and no look-ups on the network."""
    return os.environ | blas.preload_environment() | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def float32_demo() -> Path:
    """The demo model dequantised to float32, made once, in the user's cache."""
    from vllm_mlx.models.resolve import resolve

    cache = Config().cache_path
    folder = cache / "benchmark-demo-float32"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        source = resolve(Config(model="demo"), progress=lambda *_: None).path
        with tempfile.TemporaryDirectory(dir=cache) as work:
            made = Path(work) / "model"
            subprocess.run([sys.executable, "-c", EXPAND, str(source), str(made)], check=True, env=environment())
            made.rename(folder)
    return folder


@contextlib.contextmanager
def started(
    command: Sequence[str],
    *,
    log: Path | None = None,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server process for the time of the block. `log` gets its output; `variables` are added to the environment.

    It runs in `folder` if one is given: Python looks there for modules first.
    """
    with log.open("wb") if log is not None else tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=environment() | (variables or {}), stdout=output, stderr=output, cwd=folder
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
