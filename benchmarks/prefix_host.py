"""What the prefix cache costs the host: matching a long prompt, and memory for each page. No MLX."""

from __future__ import annotations

import random
import statistics
import time
import tracemalloc
from collections.abc import Callable

import msgspec

from vllm_mlx.kv.manager import Admitted, KVManager

PAGE_SIZE = 32
VOCAB_SIZE = 50_000
PROMPT_TOKENS = 100_000
CACHED_PAGES = 12_500
REPETITIONS = 25
POOL_PAGES = 1_000_000
POOL_PROMPT_PAGES = 1_000


class HostCost(msgspec.Struct, frozen=True):
    """Medians in milliseconds, and bytes."""

    lookup_hit_ms: float
    """All pages of the prompt are remembered."""
    admit_hit_ms: float
    admit_miss_ms: float
    """None of them is."""
    release_ms: float
    pool_bytes_per_page: float
    """All pages remembered, each prompt with a last page that is not full."""


def measure_host() -> HostCost:
    """Everything, in some tens of seconds."""
    return HostCost(*_matching(), pool_bytes_per_page=_bytes_per_page())


def _prompt(draw: random.Random, num_tokens: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(VOCAB_SIZE), k=num_tokens))


def _remember(manager: KVManager, name: str, token_ids: tuple[int, ...]) -> None:
    """As if it had been computed."""
    admitted = manager.admit(name, token_ids, num_tokens=len(token_ids))
    assert isinstance(admitted, Admitted), admitted
    manager.commit(name, token_ids, num_computed=len(token_ids))
    manager.release(name, token_ids)
    manager.take_orders(max_exports=0)


def _matching() -> tuple[float, float, float, float]:
    """Milliseconds of `lookup` and of `admit` with all found, of `admit` with nothing found, and of `release`."""
    draw = random.Random(0)
    num_prompt_pages = -(-PROMPT_TOKENS // PAGE_SIZE)
    manager = KVManager(CACHED_PAGES + 2 * num_prompt_pages, page_size=PAGE_SIZE)
    prompt = _prompt(draw, PROMPT_TOKENS)
    _remember(manager, "the prompt", prompt)
    for number in range(CACHED_PAGES // num_prompt_pages - 1):
        _remember(manager, f"{number}", _prompt(draw, PROMPT_TOKENS))
    rounds = [_once(manager, prompt, _prompt(draw, PROMPT_TOKENS)) for _ in range(REPETITIONS)]
    lookup, admit, missed, release = (1000 * statistics.median(column) for column in zip(*rounds, strict=True))
    return lookup, admit, missed, release


def _once(manager: KVManager, known: tuple[int, ...], other: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Seconds of each, once."""
    lookup_s = _timed(lambda: manager.lookup(known))
    admit_s = _timed(lambda: manager.admit("known", known, num_tokens=PROMPT_TOKENS))
    release_s = _timed(lambda: manager.release("known", known))
    missed_s = _timed(lambda: manager.admit("other", other, num_tokens=PROMPT_TOKENS))
    manager.release("other")
    manager.take_orders(max_exports=0)
    return lookup_s, admit_s, missed_s, release_s


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _bytes_per_page() -> float:
    """Of a manager whose pages are all remembered."""
    draw = random.Random(1)
    num_tokens = POOL_PROMPT_PAGES * PAGE_SIZE - PAGE_SIZE // 2
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    manager = KVManager(POOL_PAGES + 1, page_size=PAGE_SIZE)
    for number in range(POOL_PAGES // POOL_PROMPT_PAGES):
        _remember(manager, f"{number}", _prompt(draw, num_tokens))
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert manager.figures().pages_kept == POOL_PAGES
    return held / POOL_PAGES
