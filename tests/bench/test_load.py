"""Loads: how many at once, when, and what is left of one that is cut short."""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest

from vllm_mlx.bench.load import Load, LoadResult, arrival_times, run_load
from vllm_mlx.bench.sample import Sample

pytestmark = pytest.mark.anyio


class Device:
    """Answers after a while, and remembers how many it answered at once, and in which order they came."""

    def __init__(self, wait_s: float = 0.005) -> None:
        self.wait_s = wait_s
        self.num_open = self.max_open = 0
        self.order: list[bytes] = []

    async def send(self, body: bytes, origin_s: float) -> Sample:
        self.order.append(body)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        await asyncio.sleep(self.wait_s)
        self.num_open -= 1
        return Sample(started_s=0.0, e2e_s=self.wait_s, content=body.decode(), finish_reason="stop")


BODIES = [str(i).encode() for i in range(10)]


@pytest.mark.parametrize(
    ("load", "at_once"),
    [(Load(1), 1), (Load(4), 4), (Load(99), 10), (Load(3, math.inf), 3), (Load(None, math.inf), 10)],
)
async def test_as_many_at_once_as_asked(load: Load, at_once: int) -> None:
    device, result, ended = Device(), LoadResult(), []
    await run_load(BODIES, load, send=device.send, result=result, on_done=ended.append)
    assert device.max_open == at_once
    assert device.order == BODIES
    assert sorted(sample.content for sample in result.samples) == [body.decode() for body in BODIES]
    assert len(ended) == len(BODIES)
    assert result.is_complete
    assert result.wall_s > 0


async def test_cancelled_load_keeps_what_it_has() -> None:
    device, result = Device(), LoadResult()

    async def send(body: bytes, origin_s: float) -> Sample:
        if body == b"3":
            await asyncio.sleep(60)
        return await device.send(body, origin_s)

    task = asyncio.create_task(run_load(BODIES, Load(1), send=send, result=result, on_done=lambda _: None))
    while len(result.samples) < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [sample.content for sample in result.samples] == ["0", "1", "2"]
    assert not result.is_complete
    assert result.wall_s > 0


async def test_arrivals_are_seeded_and_have_the_rate() -> None:
    times = arrival_times(4000, Load(None, 20.0, seed=1))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times == arrival_times(4000, Load(None, 20.0, seed=1))
    assert times != arrival_times(4000, Load(None, 20.0, seed=2))
    assert times[0] == 0.0
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.1)
    # of a Poisson process: as much spread as mean
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.1)


async def test_endless_rate_sends_all_at_once() -> None:
    assert arrival_times(3, Load(None, math.inf)) == [0.0, 0.0, 0.0]
