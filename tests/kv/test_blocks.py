"""The page pool."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vllm_mlx.kv.blocks import PagePool, page_name


def test_scratch_page_is_never_handed_out() -> None:
    pool = PagePool(5)
    assert pool.allocate(4) == (1, 2, 3, 4)
    assert pool.num_free == 0


def test_lowest_free_page_comes_first() -> None:
    pool = PagePool(6)
    pool.allocate(5)
    for page in (4, 2, 5):
        pool.release(page)
    assert pool.allocate(2) == (2, 4)


def test_more_than_is_free_is_refused_and_takes_nothing() -> None:
    pool = PagePool(4)
    with pytest.raises(ValueError, match="4 pages asked for, 3 free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_shared_page_is_freed_by_its_last_user() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.share([page])
    pool.release(page)
    assert (pool.num_used, pool.num_free) == (1, 1)
    pool.release(page)
    assert (pool.num_used, pool.num_free) == (0, 2)


def test_page_cannot_be_released_twice() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.release(page)
    with pytest.raises(KeyError):
        pool.release(page)


def test_name_depends_on_everything_before_the_page_and_on_the_salt() -> None:
    first = page_name(b"", (1, 2), salt=b"")
    assert len(first) == 16
    assert first == page_name(b"", [1, 2], salt=b"")
    others = {
        page_name(b"", (2, 1), salt=b""),
        page_name(b"", (1, 2), salt=b"tenant"),
        page_name(first, (1, 2), salt=b""),
    }
    assert len(others | {first}) == 4


def test_named_page_is_kept_and_found_until_its_memory_is_needed() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    assert pool.set_name(page, b"name")
    pool.release(page)
    assert (pool.num_used, pool.num_kept, pool.num_free) == (0, 1, 2)
    assert pool.find(b"name") == page
    assert pool.allocate(1) == (2,)
    assert pool.find(b"name") == page
    assert pool.allocate(1) == (page,)
    assert pool.find(b"name") is None
    assert pool.num_evicted == 1


@pytest.mark.parametrize("count", [3, 40])
def test_pages_of_a_long_prefix_are_counted_like_those_of_a_short_one(count: int) -> None:
    pool = PagePool(2 * count + 2)
    prefix, other = pool.allocate(count), pool.allocate(count)
    assert pool.share(prefix) == list(range(count))
    assert pool.share((*prefix, *other)) == list(range(count, 2 * count))
    assert pool.share((0, *prefix, *other)) == []
    pool.check({**dict.fromkeys(prefix, 4), **dict.fromkeys(other, 3)}, num_pages=2 * count + 2)
    free = max(*prefix, *other) + 1
    with pytest.raises(KeyError):
        pool.share((*prefix, free))
    pool.check({**dict.fromkeys(prefix, 4), **dict.fromkeys(other, 3)}, num_pages=2 * count + 2)


def test_a_kept_page_can_be_shared_again() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.set_name(page, b"name")
    pool.release(page)
    pool.share([page])
    assert (pool.num_used, pool.num_kept) == (1, 0)
    with pytest.raises(KeyError):
        pool.share([2])


def test_the_page_given_back_longest_ago_goes_first() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    for page, name in zip(pages, (b"1", b"2", b"3"), strict=True):
        pool.set_name(page, name)
    for page in (2, 1, 3):
        pool.release(page)
    pool.share([2])
    pool.release(2)
    assert [pool.allocate(1)[0] for _ in range(3)] == [1, 3, 2]


def test_only_the_first_of_two_equal_pages_gets_the_name() -> None:
    pool = PagePool(4)
    first, second = pool.allocate(2)
    assert pool.set_name(first, b"same")
    assert not pool.set_name(second, b"same")
    pool.release(second)
    assert (pool.find(b"same"), pool.num_kept) == (first, 0)


def test_check_notices_a_lost_page() -> None:
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.check({page: 1}, num_pages=4)
    with pytest.raises(AssertionError):
        pool.check({}, num_pages=4)
    with pytest.raises(AssertionError):
        pool.check({page: 1}, num_pages=5)


def kept_pages(pool: PagePool, count: int) -> tuple[int, ...]:
    """Named pages that nobody uses, in the order in which they were given back."""
    pages = pool.allocate(count)
    for page in pages:
        pool.set_name(page, b"%d" % page)
        pool.release(page)
    return pages


def names(page_ids: Sequence[int]) -> list[bytes]:
    """Those that the pages have here."""
    return [b"%d" % page_id for page_id in page_ids]


def test_promised_pages_are_evicted_after_all_others() -> None:
    now = [0.0]
    pool = PagePool(9, clock=lambda: now[0])
    pages = kept_pages(pool, 8)
    pool.promise(names(pages[:2]), until=300.0)
    assert pool.allocate(6) == pages[2:]
    assert pool.num_free == 2
    assert pool.allocate(2) == pages[:2]  # who runs needs them more


def test_promise_ends_with_its_time() -> None:
    now = [0.0]
    pool = PagePool(9, clock=lambda: now[0])
    pages = kept_pages(pool, 8)
    pool.promise(names([pages[5]]), until=300.0)
    pool.promise(names([pages[6]]), until=300.0)
    pool.promise(names([pages[6]]), until=600.0)
    now[0] = 301.0
    assert pool.allocate(2) == (pages[5], pages[0])


def test_promise_holds_for_pages_in_use_when_they_are_given_back() -> None:
    pool = PagePool(5, clock=lambda: 0.0)
    first, *rest = pool.allocate(4)
    for page in (first, *rest):
        pool.set_name(page, b"%d" % page)
    pool.promise(names([first]), until=300.0)
    for page in (first, *rest):
        pool.release(page)
    assert pool.allocate(3) == tuple(rest)
    pool.check(dict.fromkeys(rest, 1), num_pages=5)


def test_half_of_the_pages_are_promised_at_most() -> None:
    now = [0.0]
    pool = PagePool(9, clock=lambda: now[0])
    pages = kept_pages(pool, 8)
    pool.promise(names(pages[:6]), until=300.0)
    assert pool.allocate(4) == pages[4:]
    now[0] = 301.0
    later = kept_pages(pool, 1)
    pool.promise(names([later[0]]), until=600.0)
    assert pool.allocate(3) == pages[1:4]


def test_clearing_ends_promises() -> None:
    pool = PagePool(5, clock=lambda: 0.0)
    pages = kept_pages(pool, 4)
    pool.promise(names([pages[0]]), until=300.0)
    assert pool.forget() == 4
    assert kept_pages(pool, 4) == pages
    assert pool.allocate(1) == pages[:1]
