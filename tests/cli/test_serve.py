"""The server process: banner, port, and how it ends."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import Served

TIMEOUT_S = 120.0


def generation(max_tokens: int, *, stream: bool = False) -> dict[str, object]:
    return {"prompt": "One, two, three,", "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}


@contextlib.contextmanager
def streaming(url: str, body: dict[str, object]) -> Iterator[Iterator[str]]:
    """Lines of a stream that has begun."""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def until_not_ready(url: str) -> None:
    """Wait until the signal has arrived."""
    while httpx.get(f"{url}/readyz", timeout=TIMEOUT_S).status_code == 200:
        time.sleep(0.01)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_pasted_command_answers(demo_server: Served) -> None:
    command = demo_server.banner[demo_server.banner.index("curl ") :]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_banner_is_all_that_standard_output_gets(demo_server: Served) -> None:
    assert demo_server.banner.strip().startswith("vllm-mlx ")
    assert "loading weights" in demo_server.errors


def test_taken_port_is_one_line_and_code_2(demo_server: Served) -> None:
    command = [sys.executable, "-m", "vllm_mlx.cli.main", "serve", "demo", "--port", demo_server.port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"vllm-mlx: error: --port: {demo_server.port} is already in use")


def test_model_that_cannot_be_loaded_is_one_line_and_code_2(tmp_path: Path, demo_model: Path) -> None:
    for file in demo_model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no_such_architecture"}))
    weights = next(demo_model.glob("*.safetensors"))
    (tmp_path / weights.name).symlink_to(weights)
    command = [sys.executable, "-m", "vllm_mlx.cli.main", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, done.stderr
    assert "no_such_architecture" in errors[0]


def test_sigterm_lets_running_requests_finish(tmp_path: Path, demo_model: Path) -> None:
    with Served(tmp_path / "log", "demo", "--drain-timeout", "600") as server:
        with streaming(server.url, generation(40, stream=True)) as lines:
            server.signal(signal.SIGTERM)
            until_not_ready(server.url)
            refused = httpx.post(f"{server.url}/v1/completions", json=generation(1), timeout=TIMEOUT_S)
            rest = [line for line in lines if line]
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert rest[-1] == "data: [DONE]"
        assert server.wait() == 0
        assert "Traceback" not in server.errors


def test_second_signal_ends_at_once(tmp_path: Path, demo_model: Path) -> None:
    with Served(tmp_path / "log", "demo", "--drain-timeout", "600") as server:
        with streaming(server.url, generation(8000, stream=True)) as lines:
            server.signal(signal.SIGINT)
            assert any(line.startswith("data: ") for line in lines)  # it goes on
            server.signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert "error" in json.loads(rest[-2].removeprefix("data: "))
        assert server.wait() == 0
        assert "Traceback" not in server.errors
