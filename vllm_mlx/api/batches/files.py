"""Uploaded files and results: contents in a folder, what is known of them in SQLite."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import IO, BinaryIO

from vllm_mlx.api.wire.files import FileAnswer
from vllm_mlx.core.errors import InvalidRequest, NotFound

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER
);
"""
_COLUMNS = "id, filename, purpose, bytes, created_at, expires_at"
_IN_USE = "(SELECT input_file_id FROM batches WHERE is_ended = 0)"
_ABANDONED_S = 86_400
"""Contents without a record that are older than this were left by a process that was killed."""
CONFLICT = 409
"""Status of a request that the object's state does not allow."""


class FileStore:
    """Every method belongs to the thread that opened the connection."""

    def __init__(self, database: sqlite3.Connection, folder: Path) -> None:
        self._database = database
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, source: IO[bytes], *, filename: str, purpose: str, expires_s: int) -> FileAnswer:
        """Copy the contents to the disk, and only then make the file known."""
        file = self.write_contents(source, filename=filename, purpose=purpose, expires_s=expires_s)
        with self._database:
            self.add(file)
        return file

    def write_contents(self, source: IO[bytes], *, filename: str, purpose: str, expires_s: int) -> FileAnswer:
        """The first half of `write`; `add` is the second."""
        now, file_id = int(time.time()), f"file-{uuid.uuid4().hex}"
        path = self._path(file_id)
        partial = path.with_suffix(".part")
        try:
            with partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
                size = target.tell()
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        return FileAnswer(
            id=file_id, bytes=size, created_at=now, expires_at=now + expires_s, filename=filename, purpose=purpose
        )

    def add(self, file: FileAnswer) -> None:
        """Make a file known; the caller commits."""
        values = (file.id, file.filename, file.purpose, file.bytes, file.created_at, file.expires_at)
        self._database.execute(f"INSERT INTO files ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", values)

    def get(self, file_id: str, *, param: str | None = None) -> FileAnswer:
        """One file. Raises NotFound."""
        self.sweep()
        found = self._database.execute(f"SELECT {_COLUMNS} FROM files WHERE id = ?", (file_id,)).fetchone()
        if found is None:
            raise NotFound(f"There is no file '{file_id}'.", param=param)
        return _file(found)

    def open(self, file_id: str) -> BinaryIO:
        """The contents. Raises NotFound."""
        try:
            return self.path(file_id).open("rb")
        except FileNotFoundError as error:
            raise NotFound(f"The contents of the file '{file_id}' are gone.") from error

    def path(self, file_id: str) -> Path:
        """Where the contents of a known file are. Raises NotFound."""
        return self._path(self.get(file_id).id)

    def page(
        self, *, purpose: str | None, after: str | None, limit: int, is_ascending: bool
    ) -> tuple[list[FileAnswer], bool]:
        """Some files in the order of their making, and whether there are more."""
        self.sweep()
        conditions, values = ["1"], []
        if purpose is not None:
            conditions.append("purpose = ?")
            values.append(purpose)
        if after is not None:
            conditions.append(f"number {'>' if is_ascending else '<'} (SELECT number FROM files WHERE id = ?)")
            values.append(self.get(after, param="after").id)
        query = f"SELECT {_COLUMNS} FROM files WHERE {' AND '.join(conditions)} ORDER BY number "
        query += "LIMIT ?" if is_ascending else "DESC LIMIT ?"
        rows = self._database.execute(query, (*values, limit + 1)).fetchall()
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str) -> None:
        """Forget a file. Raises NotFound, or InvalidRequest (409) while an unfinished batch reads it."""
        self.get(file_id)
        with self._database:
            done = self._database.execute(f"DELETE FROM files WHERE id = ? AND id NOT IN {_IN_USE}", (file_id,))
        if not done.rowcount:
            error = InvalidRequest(
                f"The file '{file_id}' is read by a batch; cancel that first.", param="file_id", code="file_in_use"
            )
            error.status = CONFLICT
            raise error
        self._path(file_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what has expired, unless an unfinished batch reads it."""
        query = f"SELECT id FROM files WHERE expires_at <= ? AND id NOT IN {_IN_USE}"
        for (file_id,) in self._database.execute(query, (int(time.time()),)).fetchall():
            with self._database:
                self._database.execute("DELETE FROM files WHERE id = ?", (file_id,))
            self._path(file_id).unlink(missing_ok=True)

    def clean(self) -> None:
        """Delete contents that no record names and nobody is writing any more."""
        with closing(self._database.execute("SELECT id FROM files")) as rows:
            known = {file_id for (file_id,) in rows}
        oldest = time.time() - _ABANDONED_S
        for path in self._folder.iterdir():
            if path.stem not in known and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    def _path(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.jsonl"


def _file(row: tuple[str, str, str, int, int, int | None]) -> FileAnswer:
    file_id, filename, purpose, size, created_at, expires_at = row
    return FileAnswer(
        id=file_id, bytes=size, created_at=created_at, expires_at=expires_at, filename=filename, purpose=purpose
    )
