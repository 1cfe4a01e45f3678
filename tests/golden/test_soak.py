"""Two hundred requests of all lengths, every fifth given up by its client: nothing fails, nothing is left behind."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from served import Served, engine_pid, resident_kib, wait_until_idle

NUM_REQUESTS = 200
CONCURRENCY = 32
WORDS = ("sea", "stone", "lamp", "river", "cloud", "bread", "letter", "horse")


def ask(client: openai.OpenAI, number: int) -> tuple[int, int]:
    """Prompt and output tokens of one request, as its client counts them; zeros if it gives up."""
    draw = random.Random(number)
    content = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 60)))
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": draw.randrange(1, 24),
        "temperature": draw.random(),
    }
    if number % 5:
        usage = client.chat.completions.create(**request).usage
        return usage.prompt_tokens, usage.completion_tokens
    request |= {"max_tokens": 500, "stream": True, "extra_body": {"ignore_eos": True}}
    chunks = client.chat.completions.create(**request)
    for _, _chunk in zip(range(draw.randrange(1, 5)), chunks, strict=False):
        pass
    chunks.close()
    return 0, 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="reads memory from /proc")
def test_two_hundred_requests_leave_nothing_behind(demo_model: Path, tmp_path: Path) -> None:
    with (
        Served(tmp_path / "server.log", "demo", "--served-model-name", "demo") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0) as client,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        list(pool.map(lambda number: ask(client, number), range(10_000, 10_000 + CONCURRENCY)))
        before, pid = wait_until_idle(server), engine_pid(server)
        memory = resident_kib(pid)
        counts = list(pool.map(lambda number: ask(client, number), range(NUM_REQUESTS)))
        after = wait_until_idle(server)

        def gained(name: str) -> float:
            return after[name] - before[name]

        assert after["vllm_mlx_pages_used"] == 0
        assert gained("vllm_mlx_requests_total /v1/chat/completions") == NUM_REQUESTS
        assert gained("vllm_mlx_prompt_tokens_total") == sum(prompt for prompt, _ in counts)
        assert gained("vllm_mlx_generation_tokens_total") == sum(output for _, output in counts)
        assert gained("vllm_mlx_engine_restarts_total") == 0
        assert engine_pid(server) == pid
        assert resident_kib(pid) < memory * 1.15
        assert "Traceback" not in server.errors
