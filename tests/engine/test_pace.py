"""How large prefill chunks get."""

from __future__ import annotations

from vllm_mlx.core.step import DecodeRow, PrefillRow, Step
from vllm_mlx.engine.pace import PrefillPace

DECODE = DecodeRow(0, 5, (1,))


def step(num_prefill: int, *, decodes: bool = False) -> Step:
    prefills = (PrefillRow(1, 0, (0,) * num_prefill, (2,), True),) if num_prefill else ()
    return Step(number=0, prefills=prefills, decodes=(DECODE,) if decodes else ())


def pace(max_tokens: int = 2048, *, min_tokens: int = 32) -> PrefillPace:
    return PrefillPace(max_tokens, stall_s=0.2, min_tokens=min_tokens)


def test_whole_budget_when_nothing_decodes() -> None:
    p = pace()
    assert p.budget(num_decoding=0, num_prefilling=1) == 2048
    p.observe(step(100), 0.05)
    assert p.budget(num_decoding=0, num_prefilling=1) == 2048


def test_slow_device_is_back_after_seconds_when_nothing_decodes() -> None:
    p = pace()
    p.observe(step(2048), 4.096)
    assert p.budget(num_decoding=0, num_prefilling=1) == 1000
    fast = pace()
    fast.observe(step(1), 1e-308)
    assert fast.budget(num_decoding=0, num_prefilling=1) == 2048
    for _ in range(9):
        p.observe(step(100), 100.0)
    assert p.budget(num_decoding=0, num_prefilling=1) == 256
    assert pace(max_tokens=64).budget(num_decoding=0, num_prefilling=1) == 64


def test_smallest_chunk_before_anything_is_measured() -> None:
    assert pace().budget(num_decoding=1, num_prefilling=1) == 32


def test_chunk_takes_as_long_as_a_stall_may() -> None:
    p = pace()
    p.observe(step(1000), 1.0)
    assert p.budget(num_decoding=1, num_prefilling=1) == 200


def test_cost_of_the_decodes_is_not_the_prefills() -> None:
    p = pace()
    for _ in range(3):
        p.observe(step(0, decodes=True), 0.5)
    p.observe(step(1000, decodes=True), 1.5)
    assert p.budget(num_decoding=1, num_prefilling=1) == 200


def test_prefill_never_looks_free() -> None:
    p = pace(max_tokens=10**9)
    p.observe(step(0, decodes=True), 9.0)
    p.observe(step(100, decodes=True), 8.0)
    assert p.budget(num_decoding=1, num_prefilling=1) == 32  # a quarter of 8 s for 100 tokens


def test_one_slow_step_changes_nothing() -> None:
    p = pace()
    for elapsed_s in (1.0, 1.0, 60.0, 1.0):
        p.observe(step(1000), elapsed_s)
    assert p.budget(num_decoding=1, num_prefilling=1) == 200


def test_pace_follows_a_lasting_change() -> None:
    p = pace()
    for _ in range(9):
        p.observe(step(1000), 1.0)
    for _ in range(9):
        p.observe(step(1000), 2.0)
    assert p.budget(num_decoding=1, num_prefilling=1) == 100


def test_short_prompts_do_not_spoil_the_measure() -> None:
    p = pace()
    p.observe(step(1000), 1.0)
    for _ in range(9):
        p.observe(step(3), 0.1)
    assert p.budget(num_decoding=1, num_prefilling=1) == 200


def test_chunks_stay_between_the_smallest_and_the_largest() -> None:
    slow, fast, tiny = pace(), pace(), pace(max_tokens=8)
    slow.observe(step(100), 100.0)
    fast.observe(step(1000), 0.0)
    assert slow.budget(num_decoding=1, num_prefilling=1) == 32
    assert fast.budget(num_decoding=1, num_prefilling=1) == 2048
    assert tiny.budget(num_decoding=1, num_prefilling=1) == 8


def test_a_burst_of_prompts_may_hold_up_a_few_streams() -> None:
    p = pace()
    p.observe(step(1000), 1.0)
    assert p.budget(num_decoding=4, num_prefilling=4) == 200
    assert p.budget(num_decoding=4, num_prefilling=8) == 400
    assert p.budget(num_decoding=1, num_prefilling=100) == 800
    assert p.budget(num_decoding=100, num_prefilling=1) == 200


def test_chunks_end_on_pages_and_crumbs_go_with_what_is_before_them() -> None:
    p = pace(min_tokens=32)
    assert p.chunk(0, 500, 100, page_size=16, is_first=True) == 96
    assert p.chunk(96, 220, 100, page_size=16, is_first=True) == 124
    assert p.chunk(7, 500, 100, page_size=16, is_first=False) == 89
    assert p.chunk(0, 100, 100, page_size=16, is_first=False) == 100
    assert p.chunk(0, 101, 100, page_size=16, is_first=False) == 96


def test_step_is_not_filled_up_with_crumbs() -> None:
    p = pace(min_tokens=512)
    assert p.chunk(0, 133, 100, page_size=16, is_first=False) == 0
    assert p.chunk(0, 133, 133, page_size=16, is_first=False) == 133
    assert p.chunk(0, 5000, 500, page_size=16, is_first=False) == 0
    assert p.chunk(0, 5000, 600, page_size=16, is_first=False) == 592
    assert p.chunk(0, 133, 100, page_size=16, is_first=True) == 133
    assert p.chunk(0, 5000, 10, page_size=16, is_first=True) == 10
