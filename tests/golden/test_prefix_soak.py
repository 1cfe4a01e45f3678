"""Two thousand requests over a cache that is always too small, on disk too, while engines and servers are killed."""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from served import Served, engine_pid, resident_kib, wait_until_idle
from soaked import Question, Service, answered, scripts
from tiny_models import write_tiny_model

SEED = 20
NUM_REQUESTS = 2_000
CONCURRENCY = 16
NUM_SCRIPTS = 90
NUM_ENGINE_KILLS, NUM_SERVER_KILLS = 5, 3
DISK_GB = 0.003
VOCAB_SIZE = 49_152
"""Of the demo model, whose tokenizer the tiny ones use."""
SERVE = ("--served-model-name", "tiny", "--dtype", "float32")
SMALL_CACHE = (
    *("--num-pages", "128", "--cache-memory-mb", "8"),
    *("--ssd-cache-max-gb", str(DISK_GB), "--ssd-cache-min-free-gb", "0"),
)

Kill = Callable[[Service], None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes and their memory through /proc"),
]


def make_model(name: str, folder: Path, demo_model: Path) -> Path:
    """A random model whose next token depends on all before, with the demo model's tokenizer."""
    changes = {
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
    }
    write_tiny_model(name, folder, scale=0.25, changes=changes)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / file, folder)
    return folder


def known_questions(model: Path, log: Path) -> list[Question]:
    """All questions, answered by a server without any cache."""
    with (
        Served(log, str(model), *SERVE, "--no-prefix-cache") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0) as client,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        found = pool.map(lambda script: answered(client, script, seed=SEED), scripts(SEED, count=NUM_SCRIPTS))
        return [question for questions in found for question in questions]


def resting_memory(server: Served) -> list[int]:
    """KiB of a server and of its engine, once nothing runs and what was kept for later is given back."""
    assert wait_until_idle(server)["vllm_mlx_pages_used"] == 0
    while httpx.get(f"{server.url}/v1/memory").json()["ledger"]["allocator_cache"]:
        time.sleep(0.2)
    return [resident_kib(server.pid), resident_kib(engine_pid(server))]


def blob_bytes(disk: Path) -> int:
    return sum(file.stat().st_size for file in disk.rglob("*") if file.suffix in (".page", ".state"))


def make_leftovers_old(disk: Path) -> list[Path]:
    """Let what killed writers have left look as if nobody writes it any more."""
    date, found = time.time() - 3600, list(disk.rglob("*.tmp"))
    for file in found:
        os.utime(file, (date, date))
    return found


def kill_times(draw: random.Random) -> dict[int, Kill]:
    """After which requests what is killed.

    All in the first half, so that the memory of one engine can be watched; and never soon after each other, because a
    request that has lost its third engine is given up.
    """
    kills = [Service.kill_engine] * NUM_ENGINE_KILLS + [Service.kill_server] * NUM_SERVER_KILLS
    draw.shuffle(kills)
    gap = NUM_REQUESTS // 2 // (len(kills) + 1)
    return {gap * (index + 1) - draw.randrange(gap // 2): kill for index, kill in enumerate(kills)}


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_kills_evictions_and_aborts_change_no_answer_and_leave_nothing(
    name: str, demo_model: Path, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    model, disk = make_model(name, tmp_path / "model", demo_model), tmp_path / "disk"
    questions = known_questions(model, tmp_path / "alone.log")
    assert len({question.answer for question in questions}) > 0.8 * len(questions), "the model answers all alike"
    kills = kill_times(random.Random(SEED))

    def start(number: int) -> Served:
        leftovers = make_leftovers_old(disk)
        log = tmp_path / f"{number}.log"
        server = Served(log, str(model), *SERVE, *SMALL_CACHE, "--ssd-cache-dir", str(disk))
        assert not any(file.exists() for file in leftovers)
        return server

    def run(service: Service, numbers: range) -> list[int]:
        """Ask these requests, killing what is to be killed; the memory in use afterwards."""
        ask = functools.partial(service.ask, questions=questions, of=NUM_REQUESTS, seed=SEED)
        for number, _ in zip(numbers, pool.map(ask, numbers), strict=True):
            if number in kills:
                kills[number](service)
        return resting_memory(service.server)

    with Service(start) as service, ThreadPoolExecutor(CONCURRENCY) as pool:
        half, quarter = NUM_REQUESTS // 2, NUM_REQUESTS * 5 // 8
        run(service, range(half))
        engine = engine_pid(service.server)
        early = run(service, range(half, quarter))
        late = run(service, range(quarter, NUM_REQUESTS))
        stats = service.stats()
        print(f"{len(questions)} questions, {service.num_retries} asked again, KiB {early} {late}, {stats}")

        assert engine_pid(service.server) == engine, "an engine ended by itself"
        assert all(after < before * 1.15 for before, after in zip(early, late, strict=True)), (early, late)
        assert stats["pages"]["used"] == stats["requests_loading"] == 0
        # None of this would mean much if nothing had been found, evicted, written and read.
        assert min(stats["pages"]["evicted"], stats["cached_tokens"], service.num_retries) > 0
        assert min(stats["disk"][count] for count in ("saved", "hits", "evicted")) > 0
        assert stats["disk"]["corrupt"] == 0
        service.server.signal(signal.SIGTERM)
        assert service.server.wait() == 0
    assert len(service.servers) == NUM_SERVER_KILLS + 1
    assert 0 < blob_bytes(disk) <= DISK_GB * 1e9
    assert len(list(disk.rglob("*.tmp"))) <= NUM_ENGINE_KILLS, "more than killed engines can have left"
    for server in service.servers:
        assert not re.search(r"\b(ERROR|CRITICAL)\b|Traceback", server.errors), server.errors[-5000:]
