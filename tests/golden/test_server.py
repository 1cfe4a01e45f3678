"""A real server with the demo model: it answers, survives its engine, and loses nothing under load."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from served import Served, engine_pid, wait_until_idle

NUM_STREAMS = 8
MAX_TOKENS = 20
WAIT_S = 240.0


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("golden") / "server.log"
    with Served(log, "demo", "--served-model-name", "demo") as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=WAIT_S, max_retries=0) as opened:
        yield opened


def health(server: Served) -> dict:
    return httpx.get(f"{server.url}/health").json()


def story(client: openai.OpenAI, number: int, *, seed: int = 7) -> str:
    """One streamed answer, drawn with a seed."""
    chunks = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": f"Tell me story number {number}."}],
        max_tokens=MAX_TOKENS,
        temperature=0.8,
        seed=seed + number,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_capital_of_france_is_paris(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=12,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_raw_text_is_continued_with_its_leading_space(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="The capital of France is", temperature=0, max_tokens=2)
    assert answer.choices[0].text == " Paris."


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the engine's process through /proc")
def test_streams_survive_a_killed_engine(server: Served, client: openai.OpenAI) -> None:
    expected = [story(client, number) for number in range(NUM_STREAMS)]
    before = health(server)["engine"]["restarts"]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        begun = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Count to 100."}], max_tokens=200, stream=True
        )
        answers = [pool.submit(story, client, number) for number in range(NUM_STREAMS)]
        for _, _chunk in zip(range(6), begun, strict=False):
            pass  # by the sixth token of this one, the others are being computed
        os.kill(engine_pid(server), signal.SIGKILL)
        begun.close()
        assert [answer.result(WAIT_S) for answer in answers] == expected
    assert health(server)["engine"]["restarts"] == before + 1
    assert wait_until_idle(server)["vllm_mlx_pages_used"] == 0


def test_aborted_and_finished_requests_leave_nothing_behind(server: Served, client: openai.OpenAI) -> None:
    before = wait_until_idle(server)

    def one(number: int) -> int:
        """Tokens counted by the client; every fifth request is given up after two chunks."""
        if number % 5:
            usage = client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "word " * (number % 7) + "Hello!"}],
                max_tokens=1 + number % 4,
            ).usage
            assert usage is not None
            return usage.completion_tokens
        chunks = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Tell a story."}], max_tokens=400, stream=True
        )
        for _, _chunk in zip(range(2), chunks, strict=False):
            pass
        chunks.close()
        return 0

    with ThreadPoolExecutor(12) as pool:
        counted = sum(pool.map(one, range(24)))
    after = wait_until_idle(server)
    assert after["vllm_mlx_pages_used"] == 0
    assert after["vllm_mlx_generation_tokens_total"] - before["vllm_mlx_generation_tokens_total"] >= counted
