"""The engine in a child process, supervised: when it dies it is started again, and open requests go on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from vllm_mlx.core.config import Config
from vllm_mlx.core.log import fields
from vllm_mlx.core.messages import EngineState, ToEngine
from vllm_mlx.core.step import ProgressCallback, RunnerInfo
from vllm_mlx.engine.client import BaseClient, log
from vllm_mlx.engine.incarnation import Ending, Incarnation

SILENCE_LIMIT_S = 15.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
HEALTHY_AFTER_S = 60.0
"""An engine that served this long proves that starting it again makes sense: the pauses start over."""


class ProcessEngine(BaseClient):
    """An `EngineClient` whose engine may crash, hang or be killed without the callers noticing more than a pause.

    The child is started as `[*command, socket_folder]` with `env` over this process's environment; it must call
    `engine.child.run_child`. Its standard output and error are this process's standard error.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        config: Config,
        env: Mapping[str, str] = {},
        on_progress: ProgressCallback | None = None,
        _silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        super().__init__(on_progress)
        self._command = tuple(command)
        self._env = dict(env)
        self._max_starts = config.engine_start_attempts
        self._silence_limit_s = _silence_limit_s
        self._child: Incarnation | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._num_vain_starts = 0
        self._pause_s = FIRST_PAUSE_S
        self._ready_at = 0.0

    @property
    def pid(self) -> int | None:
        """Id of the engine process; None while there is none."""
        return self._child.pid if self._child else None

    async def start(self) -> RunnerInfo:
        """Start the child and load the model; see `EngineClient`. May be called once."""
        if self._supervisor is not None:
            raise RuntimeError("start() was called before.")
        if self._state is not EngineState.STOPPED:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
            self._supervisor.add_done_callback(self._supervisor_ended)
        return await self._wait_started()

    async def stop(self) -> None:
        """End the child, by force if it does not listen; see `EngineClient`."""
        if self._stopping is None:
            is_ready = self._state is EngineState.READY
            self._become_stopped()
            self._stopping = asyncio.create_task(self._stop(is_ready), name="engine-stop")
        await asyncio.shield(self._stopping)

    def _send(self, message: ToEngine) -> None:
        if self._child:
            self._child.send(message)

    def _become_ready(self, info: RunnerInfo) -> None:
        self._num_vain_starts = 0
        self._ready_at = asyncio.get_running_loop().time()
        super()._become_ready(info)

    async def _supervise(self) -> None:
        """Run one child after the other until it is stopped or hopeless."""
        while True:
            ending = await self._run_child()
            if self._state is EngineState.STOPPED:
                return
            self._child_ended(ending)
            if ending.is_model_error or self._num_vain_starts >= self._max_starts:
                self._give_up(self._last_reason(ending), is_model_error=ending.is_model_error)
                return
            pause_s = self._next_pause_s()
            log.warning("%s Starting it again.", ending.reason, extra=fields(pause_s=pause_s, open=len(self._requests)))
            await asyncio.sleep(pause_s)
            self._num_restarts += 1

    async def _run_child(self) -> Ending:
        """One life of the engine process, from its start to its end."""
        self._num_vain_starts += 1
        try:
            self._child = Incarnation(
                self._command, env=self._env, on_message=self._receive, silence_limit_s=self._silence_limit_s
            )
        except OSError as error:
            return Ending(f"The engine process cannot be started: {error}.")
        try:
            return await self._child.wait_end()
        finally:
            self._child.close()
            self._child = None

    def _child_ended(self, ending: Ending) -> None:
        """Nothing comes from this child any more; its requests wait for the next one."""
        self._stats.engine_ended()
        self._queries.fail_all(ending.reason)
        self._reason = ending.reason
        if self._info is not None:
            self._state = EngineState.RESTARTING
            self._requests.engine_died(self._info.max_model_len)

    def _next_pause_s(self) -> float:
        """How long to wait before the next start: longer every time, until an engine proves healthy."""
        was_ready = self._num_vain_starts == 0
        if was_ready and asyncio.get_running_loop().time() - self._ready_at > HEALTHY_AFTER_S:
            self._pause_s = FIRST_PAUSE_S
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def _last_reason(self, ending: Ending) -> str:
        if ending.is_model_error or self._max_starts == 1:
            return ending.reason
        return f"The engine could not be started in {self._num_vain_starts} attempts. {ending.reason}"

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._give_up(f"The engine's supervision failed: {error!r}")

    async def _stop(self, is_ready: bool) -> None:
        if self._child:
            await self._child.shut_down(is_ready=is_ready)
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
