"""The contract of `EngineClient`, kept by both engines; and what only the supervised one promises."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import EngineFailure, EngineStartError, ModelError
from vllm_mlx.core.messages import CacheMatch, EngineState, FinishReason, Output, Stats, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine import incarnation
from vllm_mlx.engine.client import BaseClient
from vllm_mlx.engine.process import ProcessEngine
from vllm_mlx.engine.thread import ThreadEngine

CHILD = Path(__file__).with_name("fake_child.py")
Engine = TypeVar("Engine", bound=BaseClient)
TIMEOUT_S = 40.0
STEP_S = 0.005


def load_child() -> ModuleType:
    """The child's main module, for its faults."""
    spec = importlib.util.spec_from_file_location("fake_child", CHILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


child = load_child()

Make = Callable[..., BaseClient]
"""(fields of FaultyFactory) -> an engine that is not started."""


def make_thread(**faults: Any) -> ThreadEngine:
    factory = child.FaultyFactory(**faults)
    return ThreadEngine(factory, Config(**factory.config))


def make_process(*, silence_limit_s: float = 15.0, **faults: Any) -> ProcessEngine:
    config = Config(**faults.get("config", {}))
    env = {"FAKE_ENGINE": json.dumps(faults)}
    return ProcessEngine([sys.executable, str(CHILD)], config=config, env=env, _silence_limit_s=silence_limit_s)


@pytest.fixture(params=[make_thread, make_process], ids=["thread", "process"])
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the engines put their folders."""
    path = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", path)
    yield Path(path)
    shutil.rmtree(path)


@contextlib.asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    """The engine, started; stopped at the end; and all that within bounds."""
    async with asyncio.timeout(TIMEOUT_S):
        try:
            await engine.start()
            yield engine
        finally:
            await engine.stop()


def order(request_id: str, *, first: int = 1, seed: int = 1, max_tokens: int = 40, **sampling: Any) -> Submit:
    params = SamplingParams(seed=seed, max_tokens=max_tokens, **sampling)
    return Submit(request_id, Prompt((first, 2, 3)), params)


def orders(tag: str, count: int = 8, **options: Any) -> list[Submit]:
    return [order(f"{tag}{i}", first=i + 1, seed=1000 - 37 * i, **options) for i in range(count)]


async def collect(stream: AsyncIterator[Output]) -> list[Output]:
    return [output async for output in stream]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def undisturbed(engine: BaseClient, submits: list[Submit]) -> list[list[int]]:
    """The tokens of requests when nothing happens."""
    return [tokens(outputs) for outputs in await asyncio.gather(*(collect(engine.generate(s)) for s in submits))]


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that gives no signal; bounded by `started`."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


class Streams:
    """Several requests read side by side."""

    def __init__(self, engine: BaseClient, submits: list[Submit]) -> None:
        self._streams = [engine.generate(submit) for submit in submits]
        self.outputs: list[list[Output]] = [[] for _ in submits]

    async def read(self, count: int) -> None:
        """`count` more outputs of each."""

        async def read_one(index: int) -> None:
            for _ in range(count):
                self.outputs[index].append(await anext(self._streams[index]))

        await asyncio.gather(*(read_one(i) for i in range(len(self._streams))))

    async def read_all(self) -> list[list[int]]:
        """Everything; the tokens of each."""
        rest = await asyncio.gather(*(collect(stream) for stream in self._streams))
        for outputs, more in zip(self.outputs, rest, strict=True):
            outputs += more
        return [tokens(outputs) for outputs in self.outputs]

    async def close(self) -> None:
        for stream in self._streams:
            await stream.aclose()


def is_idle(stats: Stats) -> bool:
    return stats.num_running == stats.num_waiting == stats.pages_used == 0 and stats.pages_free > 0


# ---- both ----


@pytest.mark.anyio
async def test_start_returns_the_models_facts(make: Make) -> None:
    async with started(make(options={"max_model_len": 77})) as engine:
        status = engine.status()
        assert status.state is EngineState.READY
        assert status.info is not None
        assert status.info.max_model_len == 77


@pytest.mark.anyio
async def test_many_concurrent_requests_get_the_tokens_that_each_gets_alone(make: Make) -> None:
    async with started(make()) as engine:
        alone = [(await undisturbed(engine, [submit]))[0] for submit in orders("alone", 4)]
        together = await undisturbed(engine, orders("together", 32))
        assert together[:4] == alone
        assert [len(found) for found in together] == [40] * 32
        assert len({tuple(found) for found in together}) == 32


@pytest.mark.anyio
async def test_only_the_last_output_says_why_it_ended(make: Make) -> None:
    async with started(make()) as engine:
        [reference] = await undisturbed(engine, [order("a")])
        outputs = await collect(engine.generate(order("b")))
        assert [output.finish for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish is FinishReason.LENGTH
        stopped = await collect(engine.generate(order("c", stop_token_ids=(reference[5],))))
        assert stopped[-1].finish is FinishReason.STOP
        assert tokens(stopped) == reference[: reference.index(reference[5]) + 1]


@pytest.mark.anyio
async def test_logprobs_arrive(make: Make) -> None:
    async with started(make()) as engine:
        outputs = await collect(engine.generate(order("a", max_tokens=3, logprobs=2)))
        found = [entry for output in outputs for entry in output.logprobs or ()]
        assert [len(entry.top_ids) for entry in found if entry] == [2, 2, 2]


@pytest.mark.anyio
async def test_request_that_cannot_be_served_ends_with_an_error_and_harms_no_other(make: Make) -> None:
    async with started(make(options={"max_model_len": 16})) as engine:
        good = asyncio.create_task(collect(engine.generate(order("good"))))
        too_long = Submit("long", Prompt(tuple(range(20))), SamplingParams(seed=1, max_tokens=4))
        [output] = await collect(engine.generate(too_long))
        assert output.finish is FinishReason.ERROR
        assert output.message
        assert (await good)[-1].finish is FinishReason.LENGTH
        assert engine.status().state is EngineState.READY


@pytest.mark.anyio
async def test_closing_a_stream_early_frees_the_sequence(make: Make) -> None:
    async with started(make(options={"step_s": STEP_S})) as engine:
        streams = Streams(engine, orders("a", max_tokens=4000))
        await streams.read(2)
        await until(lambda: engine.status().stats.pages_used > 0)
        await streams.close()
        await until(lambda: is_idle(engine.status().stats))


@pytest.mark.anyio
async def test_cancelling_a_reader_frees_the_sequence(make: Make) -> None:
    async with started(make(options={"step_s": STEP_S})) as engine:
        reader = asyncio.create_task(collect(engine.generate(order("a", max_tokens=4000))))
        await until(lambda: engine.status().stats.num_running == 1)
        reader.cancel()
        await until(lambda: is_idle(engine.status().stats))


@pytest.mark.anyio
async def test_stats_tell_what_was_computed(make: Make) -> None:
    async with started(make()) as engine:
        await undisturbed(engine, orders("a", 2))
        # 3 prompt tokens and 39 of the 40 output tokens are computed; a step past the end may be counted too.
        await until(lambda: is_idle(engine.status().stats) and engine.status().stats.num_tokens >= 2 * 42)
        assert engine.status().stats.num_steps >= 40


@pytest.mark.anyio
async def test_id_of_an_open_request_is_refused(make: Make) -> None:
    async with started(make(options={"step_s": STEP_S})) as engine:
        first = Streams(engine, [order("same")])
        await first.read(1)
        with pytest.raises(ValueError, match="already open"):
            await collect(engine.generate(order("same")))
        assert len((await first.read_all())[0]) == 40


@pytest.mark.anyio
async def test_request_made_while_the_engine_starts_waits_for_it(make: Make) -> None:
    engine = make()
    early = asyncio.create_task(collect(engine.generate(order("early"))))
    await asyncio.sleep(0)
    assert engine.status().stats.num_waiting == 1
    async with started(engine):
        assert len(tokens(await early)) == 40


@pytest.mark.anyio
async def test_model_that_cannot_load_is_reported_at_once(make: Make) -> None:
    engine = make(model_error="config.json is missing.")
    with pytest.raises(ModelError, match=r"^config.json is missing.$"):
        async with started(engine):
            pass
    assert engine.status().num_restarts == 0


@pytest.mark.anyio
async def test_engine_that_cannot_start_is_given_up(make: Make, tmp_path: Path) -> None:
    engine = make(broken_if=str(tmp_path), config={"engine_start_attempts": 2})
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(EngineStartError, match="no device found"):
            await engine.start()
        assert engine.status().state is EngineState.FAILED
        assert "no device found" in await engine.wait_failed()
        [output] = await collect(engine.generate(order("late")))
        assert output.finish is FinishReason.ERROR
        assert "no device found" in (output.message or "")
        await engine.stop()


@pytest.mark.anyio
async def test_stop_ends_open_requests_with_an_error(make: Make) -> None:
    async with started(make(options={"step_s": STEP_S})) as engine:
        streams = Streams(engine, orders("a", max_tokens=4000))
        await streams.read(1)
        await engine.stop()
        await streams.read_all()
        assert {outputs[-1].finish for outputs in streams.outputs} == {FinishReason.ERROR}
        assert engine.status().state is EngineState.STOPPED
        assert is_idle(engine.status().stats) or engine.status().stats.pages_free == 0
        [output] = await collect(engine.generate(order("late")))
        assert output.finish is FinishReason.ERROR
        await engine.stop()


@pytest.mark.anyio
async def test_lookup_tells_what_a_prompt_would_find(make: Make) -> None:
    async with started(make(options={"page_size": 4})) as engine:
        prompt = Prompt(tuple(range(1, 14)))
        assert await engine.lookup(prompt) == CacheMatch(13, num_memory=0, num_stored=0, page_size=4)
        await collect(engine.generate(Submit("a", prompt, SamplingParams(seed=1, max_tokens=2))))
        assert await engine.lookup(prompt) == CacheMatch(13, num_memory=12, num_stored=0, page_size=4)
        assert (await engine.lookup(Prompt(prompt.token_ids, salt=b"other"))).num_found == 0
        assert (await engine.lookup(Prompt((*prompt.token_ids[:6], 99, 99, 99)))).num_found == 4


@pytest.mark.anyio
async def test_forgotten_prompt_is_not_found(make: Make) -> None:
    async with started(make(options={"page_size": 4})) as engine:
        prompt = Prompt(tuple(range(1, 14)))
        await collect(engine.generate(Submit("a", prompt, SamplingParams(seed=1, max_tokens=2))))
        assert (await engine.forget_cache()).num_pages == 4
        assert (await engine.lookup(prompt)).num_found == 0
        assert (await engine.forget_cache()).num_pages == 0


@pytest.mark.anyio
async def test_engine_that_is_not_ready_is_asked_nothing(make: Make) -> None:
    engine = make()
    with pytest.raises(EngineFailure, match="starting") as raised:
        await engine.lookup(Prompt((1, 2, 3)))
    assert raised.value.status == 503
    async with started(engine):
        await engine.stop()
        with pytest.raises(EngineFailure, match="stopped"):
            await engine.forget_cache()


@pytest.mark.anyio
async def test_engine_stopped_before_its_start_does_not_start(make: Make) -> None:
    engine = make()
    async with asyncio.timeout(TIMEOUT_S):
        await engine.stop()
        with pytest.raises(EngineStartError, match="stopped"):
            await engine.start()


# ---- a thread cannot come back ----


@pytest.mark.anyio
async def test_thread_that_fails_is_given_up_and_its_requests_end() -> None:
    async with started(make_thread()) as engine:
        outputs = await collect(engine.generate(order("a", first=child.CRASH)))
        assert outputs[-1].finish is FinishReason.ERROR
        assert "the device is lost" in await engine.wait_failed()
        assert engine.status().state is EngineState.FAILED


@pytest.mark.anyio
async def test_question_behind_the_step_that_fails_ends_with_the_reason() -> None:
    async with started(make_thread()) as engine:
        doomed = asyncio.create_task(collect(engine.generate(order("a", first=child.CRASH))))
        await engine.wait_failed()
        with pytest.raises(EngineFailure, match="the device is lost"):
            await engine.lookup(Prompt((1, 2, 3)))
        await doomed


# ---- a process can ----


@pytest.mark.anyio
async def test_killed_engine_comes_back_and_open_streams_go_on() -> None:
    async with started(make_process(options={"step_s": STEP_S})) as engine:
        expected = await undisturbed(engine, orders("a"))
        before = engine.status().stats
        streams = Streams(engine, orders("b"))
        await streams.read(5)
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine.status().state is EngineState.RESTARTING)
        assert "SIGKILL" in (engine.status().reason or "")
        assert engine.status().stats.num_waiting == 8
        late = asyncio.create_task(collect(engine.generate(order("late"))))
        assert await streams.read_all() == expected
        assert {outputs[-1].finish for outputs in streams.outputs} == {FinishReason.LENGTH}
        assert len(tokens(await late)) == 40
        status = engine.status()
        assert (status.state, status.num_restarts, status.reason) == (EngineState.READY, 1, None)
        assert status.stats.num_tokens >= before.num_tokens


@pytest.mark.anyio
async def test_question_to_an_engine_that_is_killed_fails_and_the_next_engine_answers() -> None:
    async with started(make_process()) as engine:
        assert engine.pid
        os.kill(engine.pid, signal.SIGSTOP)
        asked = asyncio.create_task(engine.lookup(Prompt((1, 2, 3))))
        await asyncio.sleep(0)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineFailure, match=r"SIGKILL.*Ask again") as raised:
            await asked
        assert raised.value.status == 503
        await until(lambda: engine.status().state is EngineState.READY and engine.status().num_restarts == 1)
        assert (await engine.lookup(Prompt((1, 2, 3)))).num_found == 0


@pytest.mark.anyio
async def test_engine_killed_twice_changes_no_token() -> None:
    async with started(make_process(options={"step_s": STEP_S})) as engine:
        expected = await undisturbed(engine, orders("a", temperature=0.8))
        streams = Streams(engine, orders("b", temperature=0.8))
        for _ in range(2):
            await streams.read(5)
            pid = engine.pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda old=pid: engine.pid != old)  # type: ignore[misc]
        assert await streams.read_all() == expected
        assert engine.status().num_restarts == 2


@pytest.mark.anyio
async def test_stream_closed_while_there_is_no_engine_is_forgotten() -> None:
    async with started(make_process(options={"step_s": STEP_S})) as engine:
        streams = Streams(engine, orders("a", max_tokens=4000))
        await streams.read(1)
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine.status().state is EngineState.RESTARTING)
        await streams.close()
        assert engine.status().stats.num_waiting == 0
        await until(lambda: engine.status().state is EngineState.READY)
        assert len((await undisturbed(engine, [order("b")]))[0]) == 40
        await until(lambda: is_idle(engine.status().stats))


@pytest.mark.anyio
async def test_engine_that_cannot_start_again_is_given_up(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    faults = {"options": {"step_s": STEP_S}, "broken_if": str(broken), "config": {"engine_start_attempts": 2}}
    async with started(make_process(**faults)) as engine:
        streams = Streams(engine, orders("a", max_tokens=4000))
        await streams.read(1)
        broken.touch()
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        assert "no device found" in await engine.wait_failed()
        await streams.read_all()
        assert {outputs[-1].finish for outputs in streams.outputs} == {FinishReason.ERROR}
        assert engine.status().state is EngineState.FAILED
        assert engine.pid is None


@pytest.mark.anyio
async def test_failure_of_the_runner_restarts_the_engine_with_its_reason() -> None:
    async with started(make_process(options={"step_s": STEP_S})) as engine:
        expected = await undisturbed(engine, orders("a", 2))
        streams = Streams(engine, orders("b", 2))
        await streams.read(3)
        crash = asyncio.create_task(collect(engine.generate(order("crash", first=child.CRASH))))
        await until(lambda: engine.status().state is EngineState.RESTARTING)
        assert "the device is lost" in (engine.status().reason or "")
        crash.cancel()
        assert await streams.read_all() == expected


@pytest.mark.anyio
async def test_frozen_engine_is_killed_and_restarted() -> None:
    async with started(make_process(silence_limit_s=2.5, options={"step_s": STEP_S})) as engine:
        expected = await undisturbed(engine, orders("a"))
        streams = Streams(engine, orders("b"))
        await streams.read(5)
        assert engine.pid
        os.kill(engine.pid, signal.SIGSTOP)
        await until(lambda: engine.status().state is EngineState.RESTARTING)
        assert "silent" in (engine.status().reason or "")
        assert await streams.read_all() == expected


@pytest.mark.anyio
async def test_step_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incarnation, "LAST_WORDS_TIMEOUT_S", 0.1)
    faults = {"options": {"step_s": STEP_S}, "config": {"engine_stall_timeout": 1.0}}
    async with started(make_process(**faults)) as engine:
        stall = asyncio.create_task(collect(engine.generate(order("stall", first=child.STALL))))
        await until(lambda: engine.status().state is EngineState.RESTARTING)
        assert "longer than 1 s" in (engine.status().reason or "")
        stall.cancel()
        assert len((await undisturbed(engine, [order("b")]))[0]) == 40


@pytest.mark.anyio
async def test_request_that_kills_every_engine_is_failed_and_the_others_finish() -> None:
    async with started(make_process(options={"step_s": STEP_S})) as engine:
        expected = await undisturbed(engine, orders("a", 4))
        streams = Streams(engine, orders("b", 4))
        await streams.read(2)
        poison = await collect(engine.generate(order("poison", first=child.POISON)))
        assert await streams.read_all() == expected
        assert poison[-1].finish is FinishReason.ERROR
        assert "stopped 3 times while running this request" in (poison[-1].message or "")
        assert engine.status().num_restarts == 3


@pytest.mark.anyio
async def test_requests_that_arrive_with_a_poisonous_one_are_not_blamed() -> None:
    async with started(make_process(options={"step_s": STEP_S})) as engine:
        expected = await undisturbed(engine, orders("a", 4))
        poison = order("poison", first=child.POISON)
        ends = await asyncio.gather(*(collect(engine.generate(s)) for s in [poison, *orders("b", 4)]))
        assert ends[0][-1].finish is FinishReason.ERROR
        assert [tokens(outputs) for outputs in ends[1:]] == expected


@pytest.mark.anyio
async def test_command_that_does_not_exist_is_named() -> None:
    engine = ProcessEngine(["/no/such/python"], config=Config(engine_start_attempts=1))
    with pytest.raises(EngineStartError, match="/no/such/python"):
        async with started(engine):
            pass


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.anyio
async def test_stop_leaves_no_process_and_no_folder(folder: Path) -> None:
    async with started(make_process(options={"step_s": STEP_S})) as engine:
        pid = engine.pid
        assert pid
        [private] = entries(folder)
        assert private.stat().st_mode & 0o077 == 0
        await engine.stop()
        assert is_gone(pid)
        assert not entries(folder)


@pytest.mark.anyio
async def test_long_path_of_the_temporary_folder_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    async with started(make_process()) as engine:
        assert engine.status().state is EngineState.READY


@pytest.mark.anyio
async def test_stop_during_the_start_ends_both(folder: Path) -> None:
    engine = make_process(hangs=True)
    async with asyncio.timeout(TIMEOUT_S):
        start = asyncio.create_task(engine.start())
        await until(lambda: engine.pid is not None)
        pid = engine.pid
        assert pid
        await engine.stop()
        with pytest.raises(EngineStartError, match="stopped"):
            await start
    assert is_gone(pid)
    assert not entries(folder)


@pytest.mark.anyio
async def test_stop_between_two_starts_ends_the_supervision(folder: Path) -> None:
    async with started(make_process(options={"step_s": STEP_S})) as engine:
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine.status().state is EngineState.RESTARTING)
        await engine.stop()
        assert engine.pid is None
        assert not entries(folder)


@pytest.mark.anyio
async def test_stop_ends_a_process_that_does_not_listen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incarnation, "SHUTDOWN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(incarnation, "TERMINATE_TIMEOUT_S", 0.2)
    async with started(make_process()) as engine:
        pid = engine.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        await engine.stop()
        assert is_gone(pid)
        assert not entries(folder)


@pytest.mark.anyio
async def test_cancelled_supervisor_leaves_no_process(folder: Path) -> None:
    """As when the event loop is torn down without a stop."""
    engine = make_process()
    async with asyncio.timeout(TIMEOUT_S):
        await engine.start()
        pid = engine.pid
        assert pid
        assert engine._supervisor
        engine._supervisor.cancel()
        await until(lambda: is_gone(pid))
        assert not entries(folder)


def test_engine_dies_with_its_server(folder: Path) -> None:
    script = textwrap.dedent(
        f"""
        import asyncio
        from vllm_mlx.core.config import Config
        from vllm_mlx.engine.process import ProcessEngine

        async def main():
            engine = ProcessEngine([{sys.executable!r}, {str(CHILD)!r}], config=Config(), env={{"FAKE_ENGINE": "{{}}"}})
            await engine.start()
            print("ready", flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """
    )
    env = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        assert server.stdout
        assert server.stdout.readline() == b"ready\n"
        assert len(entries(folder)) == 1
        server.kill()
        # The engine holds the server's standard error: it ends only with both.
        server.communicate(timeout=TIMEOUT_S)
    assert not entries(folder)
