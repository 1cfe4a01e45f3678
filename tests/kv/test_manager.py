"""Page tables."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mlx.kv.blocks import page_name
from vllm_mlx.kv.manager import KVManager


def test_table_covers_what_was_reserved() -> None:
    kv = KVManager(6, page_size=4)
    assert kv.reserve("a", 4)
    assert kv.page_ids("a") == (1,)
    assert kv.reserve("a", 5)
    assert kv.page_ids("a") == (1, 2)
    assert (kv.num_used, kv.num_free) == (2, 3)


def test_reserving_less_keeps_the_table() -> None:
    kv = KVManager(6, page_size=4)
    kv.reserve("a", 9)
    assert kv.reserve("a", 1)
    assert kv.page_ids("a") == (1, 2, 3)


def test_reservation_is_all_or_nothing() -> None:
    kv = KVManager(4, page_size=4)
    kv.reserve("a", 5)
    assert not kv.reserve("b", 8)
    assert kv.page_ids("b") == ()
    assert not kv.reserve("a", 16)
    assert kv.page_ids("a") == (1, 2)
    kv.check()


def test_release_frees_all_pages_and_may_be_repeated() -> None:
    kv = KVManager(4, page_size=4)
    kv.reserve("a", 12)
    kv.release("a")
    kv.release("a")
    assert (kv.num_used, kv.num_free) == (0, 3)
    kv.check()


def test_model_without_paged_layers_needs_no_pages() -> None:
    kv = KVManager(0, page_size=32)
    assert kv.could_fit(10**6)
    assert kv.reserve("a", 10**6)
    assert kv.page_ids("a") == ()
    kv.commit("a", range(100), num_computed=100)
    kv.release("a")
    assert (kv.num_used, kv.num_free, kv.num_usable) == (0, 0, 0)
    kv.check()


def test_could_fit_counts_the_whole_pool() -> None:
    kv = KVManager(4, page_size=4)
    kv.reserve("a", 12)
    assert kv.could_fit(12)
    assert not kv.could_fit(13)


def test_only_full_pages_are_named() -> None:
    kv = KVManager(6, page_size=2)
    kv.reserve("a", 6)
    first = page_name(b"", (5, 6), salt=b"s")
    second = page_name(first, (7, 8), salt=b"s")
    kv.commit("a", [5, 6, 7, 8, 9], num_computed=3, salt=b"s")
    assert (kv.find(first), kv.find(second)) == (1, None)
    kv.commit("a", [5, 6, 7, 8, 9], num_computed=4, salt=b"s")
    assert (kv.find(first), kv.find(second)) == (1, 2)


def test_equal_prefixes_have_equal_names_and_other_salts_do_not() -> None:
    kv = KVManager(8, page_size=2)
    for seq_id, salt in (("a", b""), ("b", b""), ("c", b"tenant")):
        kv.reserve(seq_id, 2)
        kv.commit(seq_id, [1, 2], num_computed=2, salt=salt)
    kv.release("a")
    assert kv.find(page_name(b"", (1, 2), salt=b"")) is None
    assert kv.find(page_name(b"", (1, 2), salt=b"tenant")) == 3


def test_check_notices_a_page_in_two_tables() -> None:
    kv = KVManager(4, page_size=4)
    kv.reserve("a", 4)
    kv.reserve("b", 4)
    kv._tables["b"].page_ids = kv.page_ids("a")
    with pytest.raises(AssertionError):
        kv.check()


moves = st.tuples(st.sampled_from("abcd"), st.sampled_from(["reserve", "commit", "release"]), st.integers(1, 30))


@settings(max_examples=60, deadline=None)
@given(num_pages=st.integers(0, 12), page_size=st.integers(1, 5), moves=st.lists(moves, max_size=40))
def test_no_page_is_lost_whatever_happens(num_pages: int, page_size: int, moves: list[tuple[str, str, int]]) -> None:
    kv = KVManager(num_pages, page_size=page_size)
    lengths: dict[str, int] = {}
    for seq_id, move, count in moves:
        if move == "reserve" and kv.reserve(seq_id, count):
            lengths[seq_id] = max(count, lengths.get(seq_id, 0))
        elif move == "commit" and seq_id in lengths:
            kv.commit(seq_id, range(lengths[seq_id]), num_computed=min(count, lengths[seq_id]))
        elif move == "release":
            kv.release(seq_id)
            lengths.pop(seq_id, None)
        kv.check()
        assert all(len(kv.page_ids(key)) == kv.pages_for(length) for key, length in lengths.items())
    for seq_id in list(lengths):
        kv.release(seq_id)
    assert kv.num_used == 0
    assert kv.num_free == kv.num_usable
