"""Sends requests: so many at once, or at times that nobody chose."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from vllm_mlx.bench.sample import Sample

Send = Callable[[bytes, float], Awaitable[Sample]]
"""(encoded request, start of the load's clock) -> what it gave."""


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent."""

    concurrency: int | None
    """Most requests at once; None: any number (with a rate)."""
    rate: float | None = None
    """Requests per second, as a Poisson process; infinity: all at once. None: the next as soon as one is done."""
    seed: int = 0
    """Of the arrival times."""


@dataclass(slots=True)
class LoadResult:
    """What a load gave so far; complete once the load has ended."""

    samples: list[Sample] = field(default_factory=list)
    """In the order in which they ended."""
    wall_s: float = 0.0
    is_complete: bool = False


async def run_load(
    bodies: Sequence[bytes], load: Load, *, send: Send, result: LoadResult, on_done: Callable[[Sample], None]
) -> None:
    """Send all bodies in order and fill `result`, also when this is cancelled."""
    origin_s = time.perf_counter()

    async def one(body: bytes) -> None:
        sample = await send(body, origin_s)
        result.samples.append(sample)
        on_done(sample)

    try:
        if load.rate is None:
            await _closed(bodies, load.concurrency or 1, one)
        else:
            await _open(bodies, load, one)
        result.is_complete = True
    finally:
        result.wall_s = time.perf_counter() - origin_s


async def _closed(bodies: Sequence[bytes], concurrency: int, one: Callable[[bytes], Awaitable[None]]) -> None:
    """So many clients, each with one request at a time."""
    waiting = iter(bodies)

    async def client() -> None:
        for body in waiting:
            await one(body)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(bodies))):
            group.create_task(client())


async def _open(bodies: Sequence[bytes], load: Load, one: Callable[[bytes], Awaitable[None]]) -> None:
    """Requests that arrive by themselves; beyond `concurrency` they wait, unmeasured."""
    gate = asyncio.Semaphore(load.concurrency or len(bodies))

    async def arrived(body: bytes) -> None:
        async with gate:
            await one(body)

    begun_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for body, due_s in zip(bodies, arrival_times(len(bodies), load), strict=True):
            await asyncio.sleep(max(0.0, begun_s + due_s - time.perf_counter()))
            group.create_task(arrived(body))


def arrival_times(count: int, load: Load) -> list[float]:
    """Seconds from the start, ascending, the first at 0; gaps are exponential with the rate's mean."""
    if load.rate is None or math.isinf(load.rate):
        return [0.0] * count
    draw = random.Random(f"{load.seed}/arrivals")
    gaps = (draw.expovariate(load.rate) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))
