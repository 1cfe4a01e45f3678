"""Responses and conversations that others may go on from, in SQLite: in memory, or in a file that survives a restart.

What was used longest ago is deleted when there is too much, and what nobody used for long when something is added.
All methods may be called from any thread, one at a time.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_mlx.api.sealed import KEY_BYTES
from vllm_mlx.core.errors import ConfigError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    id TEXT PRIMARY KEY, tenant BLOB NOT NULL, used_at REAL NOT NULL, size INTEGER NOT NULL,
    body BLOB NOT NULL, events BLOB
);
CREATE INDEX IF NOT EXISTS objects_by_use ON objects (used_at);
CREATE TABLE IF NOT EXISTS items (
    owner TEXT NOT NULL REFERENCES objects (id) ON DELETE CASCADE,
    side TEXT NOT NULL, place INTEGER NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (owner, side, place)
);
CREATE INDEX IF NOT EXISTS items_by_id ON items (id);
CREATE TABLE IF NOT EXISTS keys (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""
_MIB = 1024 * 1024
_LOCK_S = 1.0
"""How long to wait for a file that another server is about to give up."""

Item = dict[str, Any]


class StoredObject(msgspec.Struct, frozen=True):
    """A response or a conversation."""

    body: dict[str, Any]
    """As the API shows it."""
    events: bytes | None = None
    """Its stream, if it ran in the background."""


class ResponseStore:
    """A bounded store. Every object belongs to a tenant and is found by that tenant only."""

    def __init__(self, path: str | None, *, max_objects: int, max_mb: int, ttl_s: float) -> None:
        """None as path is memory. The file is this store's alone, and readable by its owner only.

        Raises:
            ConfigError: the file cannot be opened, is something else, or another server has it.
        """
        self._max_objects = max_objects
        self._max_bytes = max_mb * _MIB
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        try:
            self._db = _connect(path)
            self._db.executescript(_SCHEMA)
            self.key = self._stored_key()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"--response-store {path} cannot be used: {error}.") from error

    def close(self) -> None:
        """Close the file. May be called twice."""
        with self._lock:
            self._db.close()

    def put(
        self,
        object_id: str,
        body: bytes,
        *,
        tenant: bytes,
        items: Mapping[str, Sequence[Item]] | None = None,
        events: bytes | None = None,
    ) -> None:
        """Keep an object, and its items by side, such as 'input'; sides that are not given stay as they were."""
        now = time.time()
        with self._lock, self._db:
            self._db.execute(
                "INSERT INTO objects VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "used_at = excluded.used_at, size = excluded.size, body = excluded.body, events = excluded.events",
                (object_id, tenant, now, len(body) + len(events or b""), body, events),
            )
            for side, given in (items or {}).items():
                self._db.execute("DELETE FROM items WHERE owner = ? AND side = ?", (object_id, side))
                self._add(object_id, side, given, start=0)
            self._resize(object_id)
            self._trim(now)

    def append(self, object_id: str, side: str, items: Sequence[Item]) -> None:
        """More items of an object; nothing if it is gone."""
        now = time.time()
        with self._lock, self._db:
            if self._db.execute("UPDATE objects SET used_at = ? WHERE id = ?", (now, object_id)).rowcount == 0:
                return
            (start,) = self._db.execute(
                "SELECT coalesce(max(place) + 1, 0) FROM items WHERE owner = ? AND side = ?", (object_id, side)
            ).fetchone()
            self._add(object_id, side, items, start=start)
            self._resize(object_id)
            self._trim(now)

    def get(self, object_id: str, *, tenant: bytes) -> StoredObject | None:
        """An object; None if there is none, or not for this tenant."""
        with self._lock, self._db:
            row = self._db.execute(
                "UPDATE objects SET used_at = ? WHERE id = ? AND tenant = ? AND used_at >= ? RETURNING body, events",
                (time.time(), object_id, tenant, time.time() - self._ttl_s),
            ).fetchone()
        return StoredObject(msgspec.json.decode(row[0]), row[1]) if row else None

    def items(self, object_id: str, *sides: str) -> list[Item]:
        """The items of an object, side after side."""
        found: list[Item] = []
        with self._lock:
            for side in sides:
                rows = self._db.execute(
                    "SELECT body FROM items WHERE owner = ? AND side = ? ORDER BY place", (object_id, side)
                )
                found += [msgspec.json.decode(body) for (body,) in rows]
        return found

    def item(self, item_id: str, *, tenant: bytes) -> Item | None:
        """An item of any object of a tenant, by its id."""
        with self._lock:
            row = self._db.execute(
                "SELECT items.body FROM items JOIN objects ON objects.id = items.owner "
                "WHERE items.id = ? AND objects.tenant = ? ORDER BY objects.used_at DESC LIMIT 1",
                (item_id, tenant),
            ).fetchone()
        return msgspec.json.decode(row[0]) if row else None

    def delete_item(self, object_id: str, item_id: str) -> bool:
        """Forget one item of an object; whether there was one."""
        with self._lock, self._db:
            return self._db.execute("DELETE FROM items WHERE owner = ? AND id = ?", (object_id, item_id)).rowcount > 0

    def delete(self, object_id: str, *, tenant: bytes) -> bool:
        """Forget an object; whether there was one."""
        with self._lock, self._db:
            done = self._db.execute("DELETE FROM objects WHERE id = ? AND tenant = ?", (object_id, tenant))
            return done.rowcount > 0

    def rewrite(self, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        """Give every object's body to `change`, and keep what it returns; None leaves it."""
        with self._lock, self._db:
            for object_id, body in self._db.execute("SELECT id, body FROM objects").fetchall():
                changed = change(msgspec.json.decode(body))
                if changed is not None:
                    raw = msgspec.json.encode(changed)
                    self._db.execute("UPDATE objects SET body = ? WHERE id = ?", (raw, object_id))

    def _add(self, object_id: str, side: str, items: Iterable[Item], *, start: int) -> None:
        rows = [
            (object_id, side, place, item["id"], msgspec.json.encode(item)) for place, item in enumerate(items, start)
        ]
        self._db.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?)", rows)

    def _resize(self, object_id: str) -> None:
        self._db.execute(
            "UPDATE objects SET size = length(body) + coalesce(length(events), 0) + "
            "(SELECT coalesce(sum(length(body)), 0) FROM items WHERE owner = objects.id) WHERE id = ?",
            (object_id,),
        )

    def _trim(self, now: float) -> None:
        """Delete what is too old, then what was used longest ago until the rest is small enough."""
        self._db.execute("DELETE FROM objects WHERE used_at < ?", (now - self._ttl_s,))
        self._db.execute(
            "DELETE FROM objects WHERE id IN (SELECT id FROM "
            "(SELECT id, row_number() OVER newest AS number, sum(size) OVER newest AS total FROM objects "
            "WINDOW newest AS (ORDER BY used_at DESC, rowid DESC)) WHERE number > ? OR total > ?)",
            (self._max_objects, self._max_bytes),
        )

    def _stored_key(self) -> bytes:
        """The key of sealed reasoning: made once for a file."""
        with self._db:
            self._db.execute("INSERT OR IGNORE INTO keys VALUES ('seal', ?)", (secrets.token_bytes(KEY_BYTES),))
        (key,) = self._db.execute("SELECT value FROM keys WHERE name = 'seal'").fetchone()
        assert isinstance(key, bytes)
        return key


def _connect(path: str | None) -> sqlite3.Connection:
    if path is None:
        db = sqlite3.connect(":memory:", check_same_thread=False)
    else:
        file = Path(path).expanduser()
        file.touch(mode=0o600)
        db = sqlite3.connect(file, check_same_thread=False, timeout=_LOCK_S)
    for pragma in ("foreign_keys = ON", "locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
        db.execute(f"PRAGMA {pragma}")
    return db
