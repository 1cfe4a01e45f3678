"""Batches and the results of their lines in SQLite: what is in there is not computed again after a restart."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from vllm_mlx.api.batches import lines
from vllm_mlx.api.batches.files import CONFLICT, SCHEMA, FileStore
from vllm_mlx.api.batches.lines import Line, LineAnswer, LineError
from vllm_mlx.api.wire.batches import (
    BatchAnswer,
    BatchBody,
    BatchError,
    BatchErrors,
    BatchStatus,
    RequestCounts,
    window_s,
)
from vllm_mlx.api.wire.files import BATCH, BATCH_OUTPUT, DEFAULT_EXPIRY_S, FileAnswer
from vllm_mlx.core.errors import InvalidRequest, NotFound

DATABASE = "files.sqlite"
ID_PREFIX = "batch_"
"""Of OpenAI's batches; other dialects have their own."""
_SCHEMA = (
    SCHEMA
    + """
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    tenant TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    output_expires_s INTEGER NOT NULL,
    is_ended INTEGER NOT NULL,
    record BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS results (
    batch_id TEXT NOT NULL,
    line INTEGER NOT NULL,
    is_failed INTEGER NOT NULL,
    answer BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)
) WITHOUT ROWID;
"""
)
_BUSY_S = 30.0
"""How long another process may hold the database."""
_SPOOLED_BYTES = 1 << 22


class Work(msgspec.Struct, frozen=True):
    """A batch that is to be carried out."""

    batch: BatchAnswer
    tenant: str
    """Stands for whoever created it; empty without tenants."""


class Store:
    """Files and batches of one folder. Every method belongs to the thread that opened it.

    Several processes may open one folder: each change is one transaction, and the state of a batch is read again
    before it is changed.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError or sqlite3.Error if the folder cannot be used."""
        folder.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(folder / DATABASE, timeout=_BUSY_S)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_SCHEMA)
        self.files = FileStore(self._database, folder / "contents")
        self.files.clean()

    def close(self) -> None:
        """No method may be called after it."""
        self._database.close()

    def create(
        self, body: BatchBody, *, model: str, tenant: str, id_prefix: str = ID_PREFIX, total: int = 0
    ) -> BatchAnswer:
        """Note down a new batch; `total` is its number of lines, if that is known before they are looked at.

        Raises NotFound or InvalidRequest for its input file.
        """
        file = self.files.get(body.input_file_id, param="input_file_id")
        if file.purpose != BATCH:
            message = f"The file '{file.id}' has the purpose '{file.purpose}'; a batch needs one uploaded for 'batch'."
            raise InvalidRequest(message, param="input_file_id")
        now = int(time.time())
        batch = BatchAnswer(
            id=f"{id_prefix}{uuid.uuid4().hex}",
            endpoint=body.endpoint,
            model=model,
            input_file_id=file.id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + window_s(body.completion_window),
            metadata=body.metadata,
            request_counts=RequestCounts(total=total),
        )
        kept = body.output_expires_after
        expiry_s = kept.seconds if kept else DEFAULT_EXPIRY_S
        columns = "id, model, tenant, input_file_id, output_expires_s, is_ended, record"
        values = (batch.id, model, tenant, file.id, expiry_s, False, msgspec.json.encode(batch))
        with self._database:
            self._database.execute(f"INSERT INTO batches ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        return batch

    def get(self, batch_id: str, *, param: str | None = None) -> BatchAnswer:
        """One batch. Raises NotFound."""
        found = self._database.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)).fetchone()
        if found is None:
            raise NotFound(f"There is no batch '{batch_id}'.", param=param)
        return _batch(found)

    def page(
        self, *, after: str | None, limit: int, before: str | None = None, id_prefix: str = ID_PREFIX
    ) -> tuple[list[BatchAnswer], bool]:
        """Some batches of one dialect, latest first: those after one, or right before one; and whether there are more.

        Raises NotFound.
        """
        conditions, values, order = ["id GLOB ?"], [f"{id_prefix}*"], "DESC"
        if before is not None:
            conditions.append("number > (SELECT number FROM batches WHERE id = ?)")
            values.append(self.get(before, param="before_id").id)
            order = "ASC"
        elif after is not None:
            conditions.append("number < (SELECT number FROM batches WHERE id = ?)")
            values.append(self.get(after, param="after").id)
        query = f"SELECT record FROM batches WHERE {' AND '.join(conditions)} ORDER BY number {order} LIMIT ?"
        found = [_batch(row) for row in self._database.execute(query, (*values, limit + 1)).fetchall()]
        shown = found[:limit]
        return (shown[::-1] if before is not None else shown), len(found) > limit

    def delete(self, batch: BatchAnswer) -> None:
        """Forget a batch that has ended, and its files."""
        with self._database:
            self._database.execute("DELETE FROM batches WHERE id = ?", (batch.id,))
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            with contextlib.suppress(NotFound):
                self.files.delete(file_id or "")

    def next_work(self, model: str) -> Work | None:
        """The oldest unfinished batch of a model."""
        query = "SELECT record, tenant FROM batches WHERE is_ended = 0 AND model = ? ORDER BY number LIMIT 1"
        found = self._database.execute(query, (model,)).fetchone()
        return None if found is None else Work(_batch(found), found[1])

    def cancel(self, batch_id: str) -> BatchAnswer:
        """Ask that no more lines are carried out. Raises NotFound, or InvalidRequest (409) if it has ended."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            batch = self.get(batch_id)
            if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                return batch
            if batch.status not in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
                error = InvalidRequest(f"Cannot cancel a batch with the status '{batch.status}'.", code="batch_ended")
                error.status = CONFLICT
                raise error
            return self._save(batch, status=BatchStatus.CANCELLING, cancelling_at=int(time.time()))

    # ---- carrying out ----

    def validate(self, batch: BatchAnswer) -> BatchAnswer:
        """Look at every line: the batch has failed, or is in progress unless it was cancelled meanwhile."""
        with self.files.open(batch.input_file_id) as source:
            total, errors = lines.check(source, endpoint=batch.endpoint)
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            batch, now = self.get(batch.id), int(time.time())
            if errors:
                return self._save(batch, status=BatchStatus.FAILED, failed_at=now, errors=BatchErrors(errors))
            counts = RequestCounts(total=total)
            if batch.status is not BatchStatus.VALIDATING:
                return self._save(batch, request_counts=counts)
            return self._save(batch, status=BatchStatus.IN_PROGRESS, in_progress_at=now, request_counts=counts)

    def pending(self, batch: BatchAnswer) -> Iterator[Line]:
        """Lines that have no result when they are reached."""
        with self.files.open(batch.input_file_id) as source:
            for line in lines.read(source, endpoint=batch.endpoint):
                query = "SELECT 1 FROM results WHERE batch_id = ? AND line = ?"
                if self._database.execute(query, (batch.id, line.number)).fetchone() is None:
                    yield line

    def add_result(self, batch_id: str, line: int, answer: LineAnswer) -> BatchAnswer:
        """Keep the answer to a line, once; the batch as it is then."""
        values = (batch_id, line, answer.is_failed, msgspec.json.encode(answer))
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            batch = self.get(batch_id)
            if not self._database.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", values).rowcount:
                return batch
            counts, is_failed = batch.request_counts, answer.is_failed
            counts = RequestCounts(counts.total, counts.completed + (not is_failed), counts.failed + is_failed)
            found = lines.usage_of(bytes(answer.response.body)) if answer.response else None
            usage = lines.added(batch.usage, found) if found else batch.usage
            return self._save(batch, request_counts=counts, usage=usage)

    def finish(self, batch_id: str) -> BatchAnswer:
        """Write the output and error files, and end the batch; what has no result is reported as not executed."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            batch, now = self.get(batch_id), int(time.time())
            if batch.is_ended:
                return batch
            is_cancelled = batch.status is BatchStatus.CANCELLING
            if not is_cancelled:
                batch = self._save(batch, status=BatchStatus.FINALIZING, finalizing_at=batch.finalizing_at or now)
        counts, (code, message) = batch.request_counts, lines.CANCELLED if is_cancelled else lines.EXPIRED
        left = [] if counts.total == counts.completed + counts.failed else list(self._left(batch, code, message))
        output = self._write_results(batch, is_failed=False)
        errors = self._write_results(batch, is_failed=True, more=left)
        end = BatchStatus.CANCELLED if is_cancelled else BatchStatus.EXPIRED if left else BatchStatus.COMPLETED
        with self._database:
            for file in (output, errors):
                if file is not None:
                    self.files.add(file)
            self._database.execute("DELETE FROM results WHERE batch_id = ?", (batch_id,))
            return self._save(
                batch,
                status=end,
                output_file_id=output and output.id,
                error_file_id=errors and errors.id,
                request_counts=RequestCounts(counts.total, counts.completed, counts.failed + len(left)),
                **{f"{end}_at": int(time.time())},
            )

    def fail(self, batch_id: str, reason: BatchError) -> BatchAnswer:
        """End a batch that cannot be carried out."""
        with self._database:
            self._database.execute("DELETE FROM results WHERE batch_id = ?", (batch_id,))
            errors = BatchErrors((reason,))
            return self._save(self.get(batch_id), status=BatchStatus.FAILED, failed_at=int(time.time()), errors=errors)

    def _left(self, batch: BatchAnswer, code: str, message: str) -> Iterator[bytes]:
        for line in self.pending(batch):
            yield msgspec.json.encode(LineAnswer(new_line_id(), line.custom_id, None, LineError(code, message)))

    def _write_results(self, batch: BatchAnswer, *, is_failed: bool, more: Iterable[bytes] = ()) -> FileAnswer | None:
        """Contents of a file, not known yet, with some of the results and `more`; None if there are none."""
        (expires_s,) = self._database.execute(
            "SELECT output_expires_s FROM batches WHERE id = ?", (batch.id,)
        ).fetchone()
        query = "SELECT answer FROM results WHERE batch_id = ? AND is_failed = ? ORDER BY line"
        rows = self._database.execute(query, (batch.id, is_failed))
        name = f"{batch.id}_{'error' if is_failed else 'output'}.jsonl"
        with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as spooled:
            for answer in itertools.chain((row[0] for row in rows), more):
                spooled.write(answer + b"\n")
            if not spooled.tell():
                return None
            spooled.seek(0)
            return self.files.write_contents(spooled, filename=name, purpose=BATCH_OUTPUT, expires_s=expires_s)

    def _save(self, batch: BatchAnswer, **changes: Any) -> BatchAnswer:
        batch = msgspec.structs.replace(batch, **changes)
        values = (msgspec.json.encode(batch), batch.is_ended, batch.id)
        self._database.execute("UPDATE batches SET record = ?, is_ended = ? WHERE id = ?", values)
        return batch


def new_line_id() -> str:
    """Id of an answer to a line."""
    return f"batch_req_{uuid.uuid4().hex}"


def _batch(row: tuple[bytes, ...]) -> BatchAnswer:
    return msgspec.json.decode(row[0], type=BatchAnswer)
