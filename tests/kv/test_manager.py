"""Page tables and shared prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mlx.core.messages import CacheFreed
from vllm_mlx.kv.blocks import page_name
from vllm_mlx.kv.manager import Admission, KVManager

A = range(100, 200)
B = range(200, 300)


def take(kv: KVManager, seq_id: str, token_ids: Sequence[int], **given: object) -> object:
    """Admit a sequence with room for its known tokens."""
    admitted = kv.admit(seq_id, token_ids, **{"num_tokens": len(token_ids), **given})  # type: ignore[arg-type]
    return admitted if isinstance(admitted, Admission) else admitted.num_cached


def fill(kv: KVManager, seq_id: str, token_ids: Sequence[int]) -> None:
    """Compute all known tokens."""
    kv.commit(seq_id, token_ids, num_computed=len(token_ids))


def test_table_covers_what_was_reserved() -> None:
    kv = KVManager(6, page_size=4)
    assert take(kv, "a", A[:4]) == 0
    assert kv.page_ids("a") == (1,)
    assert kv.reserve("a", 5)
    assert kv.page_ids("a") == (1, 2)
    assert (kv.num_used, kv.num_free) == (2, 3)


def test_reserving_less_keeps_the_table() -> None:
    kv = KVManager(6, page_size=4)
    take(kv, "a", A[:9])
    table = kv.page_ids("a")
    assert kv.reserve("a", 1)
    assert kv.page_ids("a") is table


def test_reservation_is_all_or_nothing() -> None:
    kv = KVManager(4, page_size=4)
    take(kv, "a", A[:5])
    assert take(kv, "b", B[:8]) is Admission.NO_ROOM
    assert kv.page_ids("b") == ()
    assert not kv.reserve("a", 16)
    assert kv.page_ids("a") == (1, 2)
    kv.check()


def test_headroom_stays_free() -> None:
    kv = KVManager(4, page_size=4)
    assert take(kv, "a", A[:8], headroom=2) is Admission.NO_ROOM
    assert take(kv, "a", A[:8], headroom=1) == 0


def test_release_frees_all_pages_and_may_be_repeated() -> None:
    kv = KVManager(4, page_size=4)
    take(kv, "a", A[:12])
    kv.release("a")
    kv.release("a")
    assert (kv.num_used, kv.num_free) == (0, 3)
    kv.check()


def test_model_without_paged_layers_needs_no_pages() -> None:
    kv = KVManager(0, page_size=32)
    assert kv.could_fit(10**6)
    assert take(kv, "a", A, num_tokens=10**6) == 0
    assert kv.reserve("a", 10**7)
    assert kv.page_ids("a") == ()
    fill(kv, "a", A)
    kv.release("a")
    assert (kv.num_used, kv.num_free, kv.num_usable) == (0, 0, 0)
    kv.check()


def test_could_fit_counts_the_whole_pool() -> None:
    kv = KVManager(4, page_size=4)
    take(kv, "a", A[:12])
    assert kv.could_fit(12)
    assert not kv.could_fit(13)


def test_only_full_pages_are_named() -> None:
    kv = KVManager(6, page_size=2)
    take(kv, "a", [5, 6, 7, 8, 9], salt=b"s")
    first = page_name(b"", (5, 6), salt=b"s")
    second = page_name(first, (7, 8), salt=b"s")
    kv.commit("a", [5, 6, 7, 8, 9], num_computed=3)
    assert (kv._pool.find(first), kv._pool.find(second)) == (1, None)
    kv.commit("a", [5, 6, 7, 8, 9], num_computed=4)
    assert (kv._pool.find(first), kv._pool.find(second)) == (1, 2)


def test_a_prefix_is_shared_while_its_owner_runs_and_after() -> None:
    kv = KVManager(20, page_size=4)
    take(kv, "a", A[:10])
    fill(kv, "a", A[:10])
    assert take(kv, "b", [*A[:9], 1, 2, 3]) == 9
    assert kv.page_ids("b")[:2] == kv.page_ids("a")[:2]
    assert kv.page_ids("b")[2] not in kv.page_ids("a")
    assert kv.take_orders(max_exports=0).copies == ((kv.page_ids("a")[2], kv.page_ids("b")[2]),)
    kv.release("a")
    kv.release("b")
    kv.check()
    assert (kv.num_used, kv.figures().pages_kept) == (0, 3)  # and the tail that was left last
    assert take(kv, "c", A[:20]) == 10
    kv.check()


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    kv = KVManager(20, page_size=4)
    take(kv, "a", A[:6], num_tokens=6)
    fill(kv, "a", A[:6])
    kv.reserve("a", 12)
    fill(kv, "a", A[:12])
    kv.release("a")
    assert take(kv, "b", A[:20]) == 12


def test_the_last_known_token_is_always_computed() -> None:
    kv = KVManager(20, page_size=4)
    take(kv, "a", A[:8])
    fill(kv, "a", A[:8])
    assert take(kv, "b", A[:8]) == 4


def test_other_salts_share_nothing() -> None:
    kv = KVManager(20, page_size=4)
    take(kv, "a", A[:9], salt=b"one")
    fill(kv, "a", A[:9])
    assert take(kv, "b", A[:9], salt=b"two") == 0


def test_a_prefix_under_way_is_waited_for() -> None:
    kv = KVManager(20, page_size=4)
    take(kv, "a", A[:10])
    kv.commit("a", A[:10], num_computed=4)
    assert take(kv, "b", A[:10]) is Admission.PREFIX_UNDER_WAY
    assert take(kv, "other", B[:10]) == 0
    kv.commit("a", A[:10], num_computed=8)
    assert take(kv, "b", A[:10]) == 8


def test_a_planned_prefix_is_there_for_the_next_step() -> None:
    kv = KVManager(20, page_size=4)
    take(kv, "a", A[:10])
    kv.publish("a", A[:10], num_computed=8)
    assert take(kv, "b", [*A[:8], *B[:2]]) == 8
    assert take(kv, "c", A[:10]) == 8
    kv.publish("a", A[:10], num_computed=10)
    assert take(kv, "d", A[:10]) == 9
    kv.commit("a", A[:10], num_computed=8)
    kv.commit("a", A[:10], num_computed=10)
    kv.release("a", A[:10])
    assert take(kv, "e", A[:10]) == 9
    kv.check()


def test_an_owner_that_leaves_early_holds_nobody_up() -> None:
    kv = KVManager(20, page_size=4)
    take(kv, "a", A[:10])
    assert take(kv, "b", A[:10]) is Admission.PREFIX_UNDER_WAY
    kv.release("a")
    assert take(kv, "b", A[:10]) == 0
    kv.check()


def test_room_is_made_of_the_prefixes_given_back_longest_ago_from_their_end() -> None:
    kv = KVManager(7, page_size=4)
    for seq_id, tokens in (("a", A), ("b", B)):
        take(kv, seq_id, tokens[:12])
        fill(kv, seq_id, tokens[:12])
        kv.release(seq_id)
    assert (kv.figures().pages_kept, kv.num_free) == (6, 6)
    take(kv, "c", range(8))
    assert kv.figures().num_evicted_pages == 2
    kv.release("c")
    assert take(kv, "a", A[:13]) == 4
    kv.release("a")
    assert take(kv, "b", B[:13], num_tokens=12) == 8  # its end had to go for the rest of a
    kv.check()


def test_shared_pages_are_not_counted_as_room() -> None:
    kv = KVManager(4, page_size=4)
    take(kv, "a", A[:12])
    fill(kv, "a", A[:12])
    kv.release("a")
    assert take(kv, "b", A[:12], num_tokens=16) is Admission.NO_ROOM
    assert take(kv, "b", A[:12], num_tokens=12) == 8
    kv.check()


def test_a_sequence_that_waits_and_goes_is_forgotten() -> None:
    kv = KVManager(4, page_size=4)
    take(kv, "a", A[:12])
    assert take(kv, "b", B[:4]) is Admission.NO_ROOM
    kv.release("b")
    assert not kv._waiting


def test_without_sharing_nothing_is_found_or_kept() -> None:
    kv = KVManager(20, page_size=4, shares_prefixes=False)
    take(kv, "a", A[:12])
    fill(kv, "a", A[:12])
    assert take(kv, "b", A[:12]) == 0
    kv.release("a")
    kv.release("b")
    assert kv.figures().pages_kept == 0


def test_forgetting_frees_what_nobody_uses_and_hides_the_rest() -> None:
    kv = KVManager(20, page_size=4)
    for seq_id, tokens in (("a", A), ("b", B)):
        take(kv, seq_id, tokens[:8])
        fill(kv, seq_id, tokens[:8])
    kv.release("a")
    assert kv.forget() == CacheFreed(2, 0, 0)
    kv.check()
    assert take(kv, "c", A[:9]) == 0
    assert take(kv, "d", B[:9]) == 0
    for seq_id in "bcd":
        kv.release(seq_id)
    kv.check()


def test_check_notices_a_page_in_two_tables() -> None:
    kv = KVManager(4, page_size=4)
    take(kv, "a", A[:4])
    take(kv, "b", B[:4])
    kv._tables["b"].tables = (kv.page_ids("a"),)
    with pytest.raises(AssertionError):
        kv.check()


lengths = st.integers(1, 30)
kinds = st.sampled_from(["admit", "reserve", "commit", "release", "forget"])
moves = st.tuples(st.sampled_from("abcd"), kinds, lengths)


@settings(max_examples=200, deadline=None)
@given(num_pages=st.integers(0, 14), page_size=st.integers(1, 5), moves=st.lists(moves, max_size=50))
def test_no_page_is_lost_whatever_happens(num_pages: int, page_size: int, moves: list[tuple[str, str, int]]) -> None:
    kv = KVManager(num_pages, page_size=page_size)
    tokens = {"a": range(40), "b": [*range(11), *range(50, 80)], "c": range(40), "d": [*range(5), *range(90, 130)]}
    held: dict[str, int] = {}
    for seq_id, move, count in moves:
        known = tokens[seq_id]
        if move == "admit" and seq_id not in held:
            found = take(kv, seq_id, known[:count])
            if isinstance(found, int):
                assert found < count
                held[seq_id] = count
        elif move == "reserve" and seq_id in held and kv.reserve(seq_id, count):
            held[seq_id] = max(count, held[seq_id])
        elif move == "commit" and seq_id in held:
            kv.commit(seq_id, known, num_computed=min(count, held[seq_id]))
        elif move == "release":
            kv.release(seq_id, known)
            held.pop(seq_id, None)
        elif move == "forget":
            kv.forget()
        kv.check()
        if count % 3 == 0:
            kv.take_orders(max_exports=0)
        num_held = {key: -(-length // page_size) if num_pages else 0 for key, length in held.items()}
        assert all(len(kv.page_ids(key)) == num_held[key] for key in held)
    for seq_id in tokens:
        kv.release(seq_id)
    kv.take_orders(max_exports=0)
    kv.check()
    assert kv.num_used == 0
    assert kv.num_free == kv.num_usable


def test_beginning_that_is_to_be_kept_outlives_newer_prefixes() -> None:
    now = [0.0]
    kv = KVManager(9, page_size=4, clock=lambda: now[0])
    take(kv, "a", A[:16], keeps=((9, 300),))
    fill(kv, "a", A[:16])
    kv.release("a")
    take(kv, "b", B[:24])
    fill(kv, "b", B[:24])
    kv.release("b")
    assert kv.lookup(A[:16]) == (8, 0)
    now[0] = 301.0
    take(kv, "c", B[50:58])
    assert kv.lookup(A[:16])[0] < 8
    kv.check()


def test_nobody_waits_for_what_is_kept() -> None:
    kv = KVManager(9, page_size=4, clock=lambda: 0.0)
    take(kv, "a", A[:16], keeps=((16, 3600),))
    fill(kv, "a", A[:16])
    kv.release("a")
    assert kv.could_fit(32)
    assert take(kv, "b", B[:32]) == 0
    kv.check()


def test_beginning_that_is_to_be_kept_longer_than_what_follows_it_stays_so_long() -> None:
    now = [0.0]
    kv = KVManager(13, page_size=4, clock=lambda: now[0])
    take(kv, "a", A[:24], keeps=((9, 3600), (17, 300)))
    fill(kv, "a", A[:24])
    kv.release("a")
    now[0] = 301.0
    take(kv, "b", B[:40])
    fill(kv, "b", B[:40])
    kv.release("b")
    assert kv.lookup(A[:24]) == (8, 0)
    kv.check()
