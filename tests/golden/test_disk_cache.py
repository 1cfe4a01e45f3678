"""A real server with a cache on disk: what was asked twice is found after the end of the engine, and of the server."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, engine_pid, wait_until_idle

WAIT_S = 240.0
PAGE_SIZE = 32
TEXT = "The sea was calm, the lamp was lit, and nobody on the pier had seen the letter yet. " * 4


def start(folder: Path, name: str) -> Served:
    """A server whose pages go to `folder`."""
    settings = ("--served-model-name", "demo", "--ssd-cache-dir", str(folder / "cache"), "--ssd-cache-min-free-gb", "0")
    return Served(folder / name, "demo", *settings)


def stop(server: Served) -> None:
    """End it as an operator does."""
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def ask(server: Served, text: str = TEXT) -> tuple[str, int]:
    """A greedy answer, and how many tokens of its prompt were found."""
    body = {"messages": [{"role": "user", "content": f"{text}Who wrote the letter?"}], "max_tokens": 4}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "temperature": 0}, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    choice, usage = answer.json()["choices"][0], answer.json()["usage"]
    return choice["message"]["content"], usage["prompt_tokens_details"]["cached_tokens"]


def figures(server: Served) -> dict[str, Any]:
    """Those of the disk, once nothing runs."""
    wait_until_idle(server)
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/cache/stats").json()["disk"]
    return found


def kill_engine(server: Served) -> None:
    """It ends wherever it is; the server starts another."""
    os.kill(engine_pid(server), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the engine's process through /proc")
def test_what_was_asked_twice_is_found_after_a_crash_and_a_restart(demo_model: Path, tmp_path: Path) -> None:
    with start(tmp_path, "first") as server:
        expected, num_cached = ask(server)
        assert num_cached == 0
        assert ask(server)[0] == expected
        before = figures(server)
        kill_engine(server)  # some of it, or nothing, was written
        assert ask(server)[0] == expected
        after = figures(server)
        assert all(after[name] >= before[name] for name in ("saved", "bytes_written", "hits", "bytes_read"))
        assert ask(server)[0] == expected
        stop(server)
    with start(tmp_path, "second") as server:
        text, num_cached = ask(server)
        assert text == expected
        assert num_cached >= 2 * PAGE_SIZE
        found = figures(server)
        assert found["hits"] == num_cached // PAGE_SIZE
        assert (found["misses"], found["corrupt"], found["problem"]) == (0, 0, None)
        assert httpx.delete(f"{server.url}/v1/cache").json()["stored"] >= found["hits"]
        assert ask(server) == (expected, 0)
        stop(server)
        assert "Traceback" not in server.errors


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the engine's process through /proc")
def test_server_killed_again_and_again_leaves_nothing_wrong_behind(demo_model: Path, tmp_path: Path) -> None:
    texts = [TEXT[number:] for number in range(3)]
    expected: dict[str, str] = {}
    for life in range(3):
        with start(tmp_path, str(life)) as server:
            for text in (*texts, *texts):
                found, _ = ask(server, text)
                assert found == expected.setdefault(text, found)
                if text is texts[life % len(texts)]:
                    kill_engine(server)
            assert figures(server)["corrupt"] == 0
            server.signal(signal.SIGKILL)
            server.wait()
