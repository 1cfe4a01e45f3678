"""What both engine clients share: requests in, outputs out, and the state that callers see."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator

import msgspec

from vllm_mlx.core.errors import EngineFailure, EngineStartError, ModelError, StartupError
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.messages import (
    CacheForget,
    CacheForgotten,
    CacheFreed,
    CacheLookedUp,
    CacheLookup,
    CacheMatch,
    EngineState,
    EngineStatus,
    FinishReason,
    FromEngine,
    Output,
    Outputs,
    Progress,
    Ready,
    Stats,
    Submit,
    ToEngine,
)
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.step import ProgressCallback, RunnerInfo
from vllm_mlx.engine.queries import Answer, OpenQueries, Query
from vllm_mlx.engine.requests import OpenRequests
from vllm_mlx.engine.totals import StatsTotals

log = get_logger("engine")

STOPPED_MESSAGE = "The engine was stopped."


class BaseClient(ABC):
    """An `EngineClient`, but for how the engine is started, reached and stopped."""

    def __init__(self, on_progress: ProgressCallback | None = None) -> None:
        self._state = EngineState.STARTING
        self._info: RunnerInfo | None = None
        self._reason: str | None = None
        self._num_restarts = 0
        self._stats = StatsTotals()
        self._requests = OpenRequests(self._send)
        self._queries = OpenQueries(self._send)
        self._on_progress = on_progress
        self._settled = asyncio.Event()
        self._failed = asyncio.Event()
        self._start_error: StartupError | None = None

    @abstractmethod
    async def start(self) -> RunnerInfo:
        """Load the model and wait until requests are taken; see `EngineClient`."""

    @abstractmethod
    async def stop(self) -> None:
        """End the engine; see `EngineClient`."""

    @abstractmethod
    def _send(self, message: ToEngine) -> None:
        """Pass a message to the engine without waiting."""

    async def generate(self, submit: Submit) -> AsyncGenerator[Output, None]:
        """Run one sequence; see `EngineClient`. It is submitted when the first output is asked for.

        Raises:
            ValueError: a request of this id is open.
        """
        if self._state in (EngineState.FAILED, EngineState.STOPPED):
            yield Output(submit.request_id, finish=FinishReason.ERROR, message=self._reason or STOPPED_MESSAGE)
            return
        request = self._requests.add(submit)
        try:
            while True:
                output = await request.next_output()
                yield output
                if output.finish is not None:
                    return
        finally:
            self._requests.remove(request)

    async def lookup(self, prompt: Prompt) -> CacheMatch:
        """What is remembered of a prompt; see `EngineClient`."""
        answer = await self._ask(CacheLookup(self._queries.next_id(), prompt))
        assert isinstance(answer, CacheLookedUp)
        return answer.match

    async def forget_cache(self) -> CacheFreed:
        """Drop all remembered prefixes; see `EngineClient`."""
        answer = await self._ask(CacheForget(self._queries.next_id()))
        assert isinstance(answer, CacheForgotten)
        return answer.freed

    async def _ask(self, query: Query) -> Answer:
        """The engine's answer; only an engine that is ready is asked."""
        if self._state is not EngineState.READY:
            raise EngineFailure(self._reason or f"The engine is {self._state.value}.", status=503)
        return await self._queries.ask(query)

    def status(self) -> EngineStatus:
        """A look without waiting. Requests that no engine has at the moment count as waiting."""
        stats = self._stats.total
        waiting = stats.num_waiting + self._requests.num_unsubmitted
        return EngineStatus(
            state=self._state,
            info=self._info,
            stats=msgspec.structs.replace(stats, num_waiting=waiting),
            num_restarts=self._num_restarts,
            reason=self._reason,
        )

    async def wait_failed(self) -> str:
        """Wait until the engine is given up, and return the reason."""
        await self._failed.wait()
        return self._reason or ""

    async def _wait_started(self) -> RunnerInfo:
        await self._settled.wait()
        if self._start_error is not None:
            raise self._start_error
        assert self._info is not None
        return self._info

    def _receive(self, message: FromEngine) -> None:
        """Take a message from the engine; `Failed` is for the subclass."""
        match message:
            case Outputs():
                self._requests.deliver(message.outputs)
            case CacheLookedUp() | CacheForgotten():
                self._queries.deliver(message)
            case Stats():
                self._stats.update(message)
            case Ready():
                self._become_ready(message.info)
            case Progress() if self._on_progress:
                self._on_progress(message.text, message.fraction)

    def _become_ready(self, info: RunnerInfo) -> None:
        if self._state is EngineState.STOPPED:
            return
        self._state = EngineState.READY
        self._info = info
        self._reason = None
        self._requests.engine_ready()
        self._settled.set()

    def _give_up(self, reason: str, *, is_model_error: bool = False) -> None:
        """The engine will not come back."""
        if self._state is EngineState.STOPPED:
            return
        if self._settled.is_set():  # else `start` raises the reason
            log.error("The engine is given up. %s", reason)
        self._state = EngineState.FAILED
        self._reason = reason
        self._failed.set()
        self._end(ModelError(reason) if is_model_error else EngineStartError(reason), message=reason)

    def _become_stopped(self) -> None:
        if self._state is not EngineState.FAILED:
            self._reason = None
        self._state = EngineState.STOPPED
        self._end(EngineStartError("The engine was stopped while it was starting."), message=STOPPED_MESSAGE)

    def _end(self, error: StartupError, *, message: str) -> None:
        """Nobody may wait for the engine any more."""
        self._requests.finish_all(message)
        self._queries.fail_all(message)
        if not self._settled.is_set():
            self._start_error = error
            self._settled.set()
