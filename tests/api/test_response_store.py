"""The store of responses: bounds, and whose is what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.api.response_store import ResponseStore
from vllm_mlx.core.errors import ConfigError

ROOMY = {"max_objects": 100, "max_mb": 10, "ttl_s": 3600.0}
BODY = b'{"object":"response"}'


def store_of(path: Path | None = None, **changes: Any) -> ResponseStore:
    return ResponseStore(str(path) if path else None, **{**ROOMY, **changes})


def kept(store: ResponseStore, *names: str) -> list[str]:
    return [name for name in names if store.get(name, tenant=b"") is not None]


def test_what_was_used_longest_ago_goes_first() -> None:
    store = store_of(max_objects=2)
    store.put("a", BODY, tenant=b"")
    store.put("b", BODY, tenant=b"")
    assert kept(store, "a") == ["a"]
    store.put("c", BODY, tenant=b"")
    assert kept(store, "a", "b", "c") == ["a", "c"]


def test_size_is_bounded_items_included() -> None:
    store = store_of(max_mb=1)
    item = {"id": "i", "text": "x" * 400_000}
    for name in "abc":
        store.put(name, BODY, tenant=b"", items={"input": [item]})
    assert kept(store, "a", "b", "c") == ["b", "c"]
    store.append("c", "input", [{**item, "id": "j"}])
    assert kept(store, "b", "c") == ["c"]
    assert [one["id"] for one in store.items("c", "input", "output")] == ["i", "j"]


def test_what_is_too_old_is_gone() -> None:
    store = store_of(ttl_s=-1.0)
    store.put("a", BODY, tenant=b"")
    assert kept(store, "a") == []


def test_items_go_with_their_object_and_are_found_by_their_tenant() -> None:
    store = store_of()
    store.put("a", BODY, tenant=b"t", items={"input": [{"id": "i"}]})
    assert store.item("i", tenant=b"t") == {"id": "i"}
    assert store.item("i", tenant=b"") is None
    assert store.get("a", tenant=b"") is None
    assert not store.delete("a", tenant=b"")
    assert store.delete("a", tenant=b"t")
    assert store.item("i", tenant=b"t") is None


def test_a_file_keeps_objects_and_the_key(tmp_path: Path) -> None:
    first = store_of(tmp_path / "x.db")
    first.put("a", BODY, tenant=b"", items={"input": [{"id": "i"}]}, events=b"data")
    key = first.key
    first.close()
    second = store_of(tmp_path / "x.db")
    found = second.get("a", tenant=b"")
    assert found is not None
    assert (found.body, found.events) == ({"object": "response"}, b"data")
    assert second.key == key
    assert store_of().key != key


def test_a_file_that_is_something_else_is_an_error_of_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"not a database, and longer than a header of one would have to be" * 20)
    with pytest.raises(ConfigError, match="--response-store"):
        store_of(path)
    with pytest.raises(ConfigError, match="--response-store"):
        store_of(tmp_path / "missing" / "x.db")


def test_a_file_belongs_to_one_server(tmp_path: Path) -> None:
    first = store_of(tmp_path / "x.db")
    with pytest.raises(ConfigError, match="locked"):
        store_of(tmp_path / "x.db")
    assert (tmp_path / "x.db").stat().st_mode & 0o077 == 0
    first.close()
    store_of(tmp_path / "x.db").close()
