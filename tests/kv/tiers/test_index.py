"""Which files are known, in which order."""

from __future__ import annotations

from vllm_mlx.kv.tiers.index import Index

MINUTE_NS = 60 * 1_000_000_000


def test_sizes_follow_what_is_added_and_dropped() -> None:
    index = Index("own/")
    index.add("own/a", size_bytes=10, dated_ns=1)
    index.add("other/b", size_bytes=5, dated_ns=2)
    index.add("own/a", size_bytes=12, dated_ns=3)
    assert (index.size_bytes, index.own_bytes, index.num_own) == (17, 12, 1)
    index.drop("own/a")
    index.drop("own/a")
    assert (index.size_bytes, index.own_bytes, index.num_own) == (5, 0, 0)


def test_use_decides_who_is_oldest() -> None:
    index = Index("own/")
    for position, path in enumerate("abc"):
        index.add(path, size_bytes=1, dated_ns=position)
    index.use("a", 10)
    assert list(index) == ["b", "c", "a"]
    assert index.oldest() == "b"


def test_file_is_dated_anew_once_a_minute() -> None:
    index = Index("own/")
    index.add("a", size_bytes=1, dated_ns=0)
    asked = [index.use("a", at) for at in (1, MINUTE_NS - 1, MINUTE_NS, MINUTE_NS + 1, 2 * MINUTE_NS)]
    assert asked == [False, False, True, False, True]
    assert not index.use("unknown", 5 * MINUTE_NS)


def test_scan_drops_what_is_gone_and_sorts_what_it_finds() -> None:
    index = Index("own/")
    index.add("old", size_bytes=1, dated_ns=5)
    index.add("gone", size_bytes=1, dated_ns=6)
    index.begin_scan()
    index.add("new", size_bytes=1, dated_ns=3)
    index.add("old", size_bytes=1, dated_ns=5)
    index.add("written meanwhile", size_bytes=1, dated_ns=4)
    index.end_scan()
    assert list(index) == ["new", "written meanwhile", "old"]


def test_scan_does_not_forget_a_use() -> None:
    index = Index("own/")
    index.add("a", size_bytes=1, dated_ns=1)
    index.add("b", size_bytes=1, dated_ns=2)
    index.use("a", 10)
    index.begin_scan()
    index.add("a", size_bytes=1, dated_ns=1)
    index.add("b", size_bytes=1, dated_ns=2)
    index.end_scan()
    assert list(index) == ["b", "a"]


def test_unreadable_file_counts_until_it_is_replaced() -> None:
    index = Index("own/")
    index.add("own/a", size_bytes=10, dated_ns=1)
    index.mark_unreadable("own/a")
    index.add("own/a", size_bytes=10, dated_ns=1)
    assert not index.has("own/a")
    assert index.size_bytes == 10
    index.add("own/a", size_bytes=10, dated_ns=2)
    assert index.has("own/a")


def test_only_the_models_own_files_are_forgotten() -> None:
    index = Index("own/")
    for path in ("own/a", "own/b", "other/a"):
        index.add(path, size_bytes=1, dated_ns=0)
    assert index.forget_own() == 2
    assert list(index) == ["other/a"]
