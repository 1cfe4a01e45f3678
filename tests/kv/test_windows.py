"""Pages of groups of layers with a sliding window: given back as it moves on, and found again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from vllm_mlx.core.cachespec import PageGroups
from vllm_mlx.kv.blocks import PagePool, group_name, page_name
from vllm_mlx.kv.manager import Admission, KVManager

A = range(100, 200)
B = range(200, 300)
PAGE = 4
GLOBAL_AND_LOCAL = (None, 6)
"""Six tokens reach back two pages from a page boundary."""


def open_manager(num_pages: int = 64, *, windows: tuple[int | None, ...] = GLOBAL_AND_LOCAL) -> KVManager:
    return KVManager(num_pages, page_size=PAGE, windows=windows, max_chunk=8)


def compute(kv: KVManager, seq_id: str, token_ids: Sequence[int], *, chunk: int = 8, start: int = 0) -> None:
    """Compute known tokens chunk by chunk."""
    for begin, end in pairwise([*range(start, len(token_ids), chunk), len(token_ids)]):
        assert kv.cover(seq_id, end) == end
        kv.commit(seq_id, token_ids, num_computed=end)
        kv.check()
        assert begin < end


def serve(kv: KVManager, seq_id: str, token_ids: Sequence[int], **given: object) -> int:
    """Admit a sequence, compute what is not cached, and end it; returns what was."""
    found = kv.admit(seq_id, token_ids, num_tokens=len(token_ids), **given)  # type: ignore[arg-type]
    assert not isinstance(found, Admission)
    kv.take_orders(max_exports=0)
    compute(kv, seq_id, token_ids, start=found.num_cached)
    kv.release(seq_id, token_ids)
    kv.check()
    return found.num_cached


def held(kv: KVManager, seq_id: str) -> list[int]:
    """Pages in each group."""
    page_ids, others = kv.row_tables(seq_id)
    return [sum(page_id != 0 for page_id in table) for table in (page_ids, *others)]


def test_pages_that_no_window_shows_any_more_are_given_back() -> None:
    kv = open_manager()
    kv.admit("a", A[:40], num_tokens=40)
    assert held(kv, "a") == [10, 0]  # in a window they come chunk by chunk
    compute(kv, "a", A[:40])
    assert held(kv, "a") == [10, 2]
    for num_tokens in range(41, 60):
        assert kv.reserve("a", num_tokens + 1)
        kv.commit("a", A[:num_tokens], num_computed=num_tokens)
        kv.check()
        assert held(kv, "a")[1] <= 4
    assert held(kv, "a")[0] == 15
    _, (local,) = kv.row_tables("a")
    assert local[: 59 // PAGE - 2] == (0,) * (59 // PAGE - 2)


def test_a_table_is_the_same_object_until_it_changes() -> None:
    kv = open_manager()
    kv.admit("a", A[:12], num_tokens=16)
    compute(kv, "a", A[:12])
    assert kv.reserve("a", 14)
    before = kv.row_tables("a")
    kv.commit("a", A[:13], num_computed=13)
    assert kv.row_tables("a") is before


def test_a_model_of_windows_only_serves_sequences_longer_than_its_pool() -> None:
    kv = open_manager(6, windows=(6,))
    assert kv.most_tokens is None
    assert kv.could_fit(10_000)
    assert serve(kv, "a", range(400)) == 0


def test_whoever_goes_on_behind_a_prefix_needs_only_the_window_of_local_pages() -> None:
    kv = open_manager()
    serve(kv, "a", A[:42])
    found = kv.admit("b", [*A[:40], 1, 2, 3], num_tokens=43)
    assert not isinstance(found, Admission)
    assert found.num_cached == 40
    assert held(kv, "b") == [11, 2]
    _, (local,) = kv.row_tables("b")
    assert local[:8] == (0,) * 8


def test_a_prefix_without_its_window_is_not_found() -> None:
    kv = open_manager(27)  # 26 pages: 12 and 5 for a, of which the rest is left behind
    serve(kv, "a", A[:48])
    assert kv.lookup([*A[:20], 1]) == (20, 0)
    serve(kv, "b", B[:24])  # takes what a left behind
    assert kv.lookup([*A[:20], 1]) == (0, 0)
    assert kv.lookup([*A[:48], 1]) == (48, 0)
    assert kv.lookup([*B[:24], 1]) == (24, 0)


def test_windows_where_prompts_part_outlive_those_between() -> None:
    kv = open_manager(27)
    serve(kv, "a", A[:48], breakpoints=(20,))
    serve(kv, "b", B[:16])
    assert kv.lookup([*A[:20], 1]) == (20, 0)
    assert kv.lookup([*A[:28], 1]) == (20, 0)
    assert kv.lookup([*A[:48], 1]) == (48, 0)


def test_what_was_left_behind_is_evicted_first() -> None:
    pool = PagePool(5)
    old, left, newer, young = pool.allocate(4)
    for page_id, letter in ((old, b"a"), (left, b"b"), (newer, b"c"), (young, b"d")):
        pool.set_name(page_id, letter * 16)
    for page_id in (old, newer):
        pool.release(page_id)
    for page_id in (left, young):
        pool.release(page_id, is_left_behind=True)
    pool.touch(young)
    assert [pool.allocate(1)[0] for _ in range(4)] == [left, old, newer, young]


def test_pages_of_other_groups_have_other_names() -> None:
    kv = open_manager()
    kv.admit("a", A[:4], num_tokens=4)
    compute(kv, "a", A[:4])
    name = page_name(b"", A[:4], salt=b"")
    page_ids, (local,) = kv.row_tables("a")
    assert (kv._pool.find(name), kv._pool.find(group_name(name, 1))) == (page_ids[0], local[0])
    assert len({group_name(name, group) for group in range(8)}) == 8


def test_the_last_page_is_copied_in_every_group() -> None:
    kv = open_manager()
    serve(kv, "a", A[:42])
    found = kv.admit("b", A[:42], num_tokens=42)
    assert not isinstance(found, Admission)
    assert found.num_cached == 41
    page_ids, (local,) = kv.row_tables("b")
    assert [target for _, target in kv.take_orders(max_exports=0).copies] == [page_ids[10], local[10]]
    kv.check()


def test_pages_promised_to_a_prompt_under_way_are_not_given_to_another() -> None:
    kv = open_manager(24, windows=(6,))  # a prompt takes seven at a time: two behind, four in two chunks, one more
    for seq_id, tokens in (("a", A), ("b", B), ("c", range(60))):
        assert not isinstance(kv.admit(seq_id, tokens, num_tokens=60), Admission)
    assert kv.admit("d", range(60, 99), num_tokens=39) is Admission.NO_ROOM
    compute(kv, "a", A[:60])
    assert not isinstance(kv.admit("d", range(60, 99), num_tokens=39), Admission)
    kv.check()


def test_as_much_is_covered_as_there_is_room_for() -> None:
    kv = open_manager(6, windows=(6,))
    kv.admit("a", A[:60], num_tokens=60)
    assert kv.cover("a", 60) == 20
    kv.commit("a", A[:60], num_computed=20)
    assert kv.cover("a", 60) == 32
    kv.check()


def test_a_pinned_prompt_keeps_the_windows_where_others_part_from_it() -> None:
    kv = open_manager(64)
    kv.admit("a", A[:40], num_tokens=40, breakpoints=(20,), is_pinned=True)
    compute(kv, "a", A[:40])
    kv.release("a", A[:40])
    assert kv.num_pinned == 10 + 2 + 3  # all; two at the breakpoint, three at the end and one page before it
    for start in range(1000, 3000, 100):
        serve(kv, "x", range(start, start + 90))
    assert kv.lookup([*A[:20], 1]) == (20, 0)
    assert kv.lookup([*A[:40], 1]) == (40, 0)
    assert kv.lookup([*A[:28], 1]) == (20, 0)
    kv.forget()
    kv.check()
    assert kv.num_used == 0


@pytest.mark.parametrize("windows", [(None,), (6,), (None, 6), (None, 1, 9, 33)])
def test_the_longest_sequence_fits_and_a_longer_one_does_not(windows: tuple[int | None, ...]) -> None:
    groups = PageGroups(windows, PAGE)
    for num_pages in range(60):
        most = groups.most_tokens(num_pages)
        if most is None:
            assert None not in windows
            assert groups.pages_for(10**6) <= num_pages
        else:
            assert groups.pages_for(most) <= num_pages < groups.pages_for(most + 1)


def test_pages_that_a_window_reaches_back() -> None:
    groups = PageGroups((None, 1, 2, 33, 34), 32)
    assert [groups.reach_back(group) for group in range(5)] == [None, 0, 1, 1, 2]
    assert [groups.first_page(group, 100) for group in range(5)] == [0, 3, 2, 2, 1]
