"""Carries out batches, one after the other and a few lines at a time, while nobody else waits for the model."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Iterator
from functools import partial

import filelock
import msgspec
from starlette.types import ASGIApp

from vllm_mlx.api import errors
from vllm_mlx.api.batches.background import Answer, post
from vllm_mlx.api.batches.desk import Desk
from vllm_mlx.api.batches.lines import Line, LineAnswer, LineResponse
from vllm_mlx.api.batches.store import Store, Work, new_line_id
from vllm_mlx.api.dialect import speaks_anthropic
from vllm_mlx.api.wire.anthropic.errors import OVERLOADED, error_answer
from vllm_mlx.api.wire.batches import BatchAnswer, BatchError, BatchStatus
from vllm_mlx.core import log
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import InvalidRequest, NotFound, RequestError, one_line
from vllm_mlx.core.messages import EngineClient, EngineState

_log = log.get_logger("batches")
POLL_S = 5.0
"""Between two looks for what other processes have left in the folder."""
_QUIET_S = 0.05
_RETRY_S = 1.0
_BUSY = (503, OVERLOADED)
"""Statuses of a server that has no time, in the dialects of the endpoints."""


class BatchRunner:
    """Works off the batches of one model in one folder; of several servers over one folder, one of them does it.

    Used on one event loop. What is done is kept, line by line: whoever comes after a kill goes on from there.
    """

    def __init__(self, app: ASGIApp, engine: EngineClient, desk: Desk, *, config: Config) -> None:
        """`app` answers the lines; `engine` says whether there is time for them."""
        self._app = app
        self._engine = engine
        self._desk = desk
        self._config = config
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._current: _Current | None = None
        self._is_stopped = False

    def begin(self) -> None:
        """There may be something to do."""
        self._news.set()
        if self._is_stopped or (self._task is not None and not self._task.done()):
            return
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_report)

    def resume(self) -> None:
        """Go on with what an earlier server left, if there was one."""
        if self._desk.has_store:
            self.begin()

    async def cancel(self, batch_id: str) -> BatchAnswer:
        """End a batch after the lines that are done. Raises NotFound, or InvalidRequest if it has ended."""
        batch = await self._desk.call(lambda store: store.cancel(batch_id))
        if self._current is not None and self._current.batch_id == batch_id:
            self._current.cancelled.set()
        self.begin()
        return batch

    async def stop(self) -> None:
        """Leave the lines under way to a later server, and begin nothing any more."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        name = hashlib.sha256(self._config.model_name.encode()).hexdigest()[:16]
        lock = filelock.FileLock(self._desk.folder / f"{name}.lock")
        try:
            while True:
                self._news.clear()
                if not (_taken(lock) and await self._work_once()):
                    await _first(self._news.wait(), timeout_s=POLL_S)
        finally:
            lock.release()

    async def _work_once(self) -> bool:
        """Carry out the oldest batch; False if there is none or the store fails."""
        try:
            work = await self._desk.call(lambda store: store.next_work(self._config.model_name))
            if work is None:
                return False
            await self._carry_out(work)
        except RequestError as error:
            _log.error("a batch cannot go on now: %s", one_line(error))
            return False
        return True

    async def _carry_out(self, work: Work) -> None:
        batch = work.batch
        _log.info("batch %s: %s", batch.id, batch.status)
        try:
            if batch.status is BatchStatus.VALIDATING:
                batch = await self._desk.call(lambda store: store.validate(batch))
            if batch.status is BatchStatus.IN_PROGRESS:
                await self._run_lines(msgspec.structs.replace(work, batch=batch))
            if not batch.is_ended:
                batch = await self._desk.call(lambda store: store.finish(batch.id))
        except NotFound as error:
            reason = BatchError("input_file_missing", error.message, "input_file_id")
            batch = await self._desk.call(lambda store: store.fail(batch.id, reason))
        counts = batch.request_counts
        _log.info("batch %s: %s, %d done, %d failed", batch.id, batch.status, counts.completed, counts.failed)

    async def _run_lines(self, work: Work) -> None:
        """Until all are done, or the batch is cancelled, or its time is over."""
        lines = await self._desk.call(lambda store: store.pending(work.batch))
        self._current = current = _Current(work, lines)
        try:
            await _first(
                self._all_lines(current), current.cancelled.wait(), timeout_s=work.batch.expires_at - time.time()
            )
        finally:
            self._current = None
            await self._desk.call(lambda _: current.close())

    async def _all_lines(self, current: _Current) -> None:
        num_workers = min(self._config.batch_concurrency, max(1, self._config.max_num_seqs - 1))
        workers = [asyncio.create_task(self._some_lines(current)) for _ in range(num_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)

    async def _some_lines(self, current: _Current) -> None:
        """One line after the other while there are any."""
        while (line := await self._desk.call(lambda _: current.next())) is not None:
            answer = await self._answered(line, current.work)
            batch = await self._desk.call(partial(_keep, batch_id=current.batch_id, line=line, answer=answer))
            if batch.status is BatchStatus.CANCELLING:  # by a server over the same folder
                current.cancelled.set()

    async def _answered(self, line: Line, work: Work) -> LineAnswer:
        """The endpoint's answer, whatever it is, unless it is that the server has no time."""
        if (refused := _refused(line, work.batch.endpoint)) is not None:
            return _line_answer(line, refused)
        headers = {}
        if self._config.cache_tenant_header is not None and work.tenant:
            headers[self._config.cache_tenant_header] = work.tenant
        while True:
            await self._quiet()
            answer = await post(self._app, work.batch.endpoint, line.body, headers=headers)
            if answer.status not in _BUSY:
                return _line_answer(line, answer)
            await asyncio.sleep(_RETRY_S)

    async def _quiet(self) -> None:
        """Wait until the engine runs and nobody waits for it."""
        while True:
            status = self._engine.status()
            has_room = status.stats.num_running < self._config.max_num_seqs and not status.stats.num_waiting
            if status.state is EngineState.READY and has_room:
                return
            await asyncio.sleep(_QUIET_S)


class _Current:
    """The batch under way. `next` and `close` are called on the store's thread."""

    def __init__(self, work: Work, lines: Iterator[Line]) -> None:
        self.work = work
        self.batch_id = work.batch.id
        self.cancelled = asyncio.Event()
        self._lines: Iterator[Line] | None = lines

    def next(self) -> Line | None:
        """The next line without a result."""
        return next(self._lines, None) if self._lines is not None else None

    def close(self) -> None:
        """Close the file of lines."""
        self._lines = None


def _keep(store: Store, *, batch_id: str, line: Line, answer: LineAnswer) -> BatchAnswer:
    return store.add_result(batch_id, line.number, answer)


def _line_answer(line: Line, answer: Answer) -> LineAnswer:
    line_id = new_line_id()
    response = LineResponse(answer.status, answer.headers.get("x-request-id", line_id), msgspec.Raw(answer.body))
    return LineAnswer(line_id, line.custom_id, response)


class _Modes(msgspec.Struct, frozen=True):
    """Fields that would end the answer before the work, or split it up."""

    stream: bool | None = None
    background: bool | None = None


def _refused(line: Line, endpoint: str) -> Answer | None:
    """The answer to a line that asks for what a batch cannot give; what else is wrong the endpoint will say."""
    try:
        modes = msgspec.json.decode(line.body, type=_Modes)
    except msgspec.ValidationError:
        return None
    name = "stream" if modes.stream else "background" if modes.background else None
    if name is None:
        return None
    error = InvalidRequest(f"{name} must not be true in a batch.", param=name, code="unsupported_value")
    if speaks_anthropic({"path": endpoint, "headers": ()}):
        return Answer(error.status, {}, msgspec.json.encode(error_answer(error, request_id=new_line_id())))
    return Answer(error.status, {}, msgspec.json.encode(errors.body(error)))


def _taken(lock: filelock.BaseFileLock) -> bool:
    """Whether this process is the one that works; the system frees the lock of one that is killed."""
    if lock.is_locked:
        return True
    try:
        lock.acquire(blocking=False)
    except (filelock.Timeout, OSError):
        return False
    return True


async def _first(*works: Coroutine[None, None, object], timeout_s: float) -> None:
    """Wait for the first to end and end the others; raises what it raises. After the time, ends all."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("batches are not carried out any more", exc_info=error)
