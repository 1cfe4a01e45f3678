"""The page pool."""

from __future__ import annotations

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
    pool.share(page)
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


def test_named_page_is_found_until_it_is_freed() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.set_name(page, b"name")
    assert pool.find(b"name") == page
    pool.release(page)
    assert pool.find(b"name") is None


def test_first_of_two_equal_pages_is_found() -> None:
    pool = PagePool(4)
    first, second = pool.allocate(2)
    pool.set_name(first, b"same")
    pool.set_name(second, b"same")
    assert pool.find(b"same") == first
    pool.release(second)
    assert pool.find(b"same") == first


def test_check_notices_a_lost_page() -> None:
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.check({page: 1}, num_pages=4)
    with pytest.raises(AssertionError):
        pool.check({}, num_pages=4)
    with pytest.raises(AssertionError):
        pool.check({page: 1}, num_pages=5)
