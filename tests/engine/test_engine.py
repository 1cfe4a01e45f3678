"""The loop, from messages to messages, over the fake runner."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.messages import (
    Abort,
    Failed,
    FinishReason,
    FromEngine,
    Output,
    Outputs,
    Progress,
    Ready,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
)
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import MemoryUse, ProgressCallback, Runner, RunnerFactory, Step, StepResult
from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.overlap import Overlap
from vllm_mlx.engine.scheduler import Scheduler
from vllm_mlx.testing.fake import FakeRunner, fake_factory


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the engine logs, whether or not the package's logs are set up to go on to the root logger."""
    logger = get_logger("engine")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.DEBUG, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


class ScriptedInbox:
    """Each call gives the next batch, a wait the next that is not empty; waiting for ever with none left, Shutdown."""

    def __init__(self, *batches: list[ToEngine]) -> None:
        self._batches = list(batches)
        self.num_waits = 0

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        self.num_waits += timeout_s is None
        while self._batches:
            batch = self._batches.pop(0)
            if batch or timeout_s == 0:
                return batch
        return [Shutdown()] if timeout_s is None else []


class ListOutbox:
    def __init__(self) -> None:
        self.messages: list[FromEngine] = []

    def send(self, message: FromEngine) -> None:
        self.messages.append(message)


class Recorder(FakeRunner):
    """Notes the order of calls."""

    def __init__(self, calls: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.calls = calls

    def build(self, step: Step) -> Any:
        self.calls.append(f"build {step.number}")
        return super().build(step)

    def start(self, handle: Any) -> None:
        super().start(handle)
        self.calls.append(f"start {handle.step.number}")

    def collect(self, handle: Any) -> StepResult:
        result = super().collect(handle)
        self.calls.append(f"collect {result.number}")
        return result

    def idle(self) -> None:
        self.calls.append("idle")

    def close(self) -> None:
        self.calls.append("close")
        super().close()


class Dropper(FakeRunner):
    """Has temporary memory until it rests."""

    num_cached_bytes = 1000

    def memory(self) -> MemoryUse:
        return msgspec.structs.replace(super().memory(), cache=self.num_cached_bytes)

    def idle(self) -> bool:
        self.num_cached_bytes = 0
        return super().idle()


def count_up(tokens: tuple[int, ...]) -> int:
    return tokens[-1] + 1


def submit(name: str, *prompt: int, **given: Any) -> Submit:
    return Submit(name, Prompt(prompt or (10, 20)), SamplingParams(**{"seed": 1, "max_tokens": 3, **given}))


def run(
    *batches: list[ToEngine], factory: RunnerFactory | None = None, **settings: Any
) -> tuple[list[FromEngine], Engine, ScriptedInbox]:
    inbox, outbox = ScriptedInbox(*batches), ListOutbox()
    engine = Engine(factory or fake_factory(script=count_up), Config(**settings), inbox=inbox, outbox=outbox)
    engine.run()
    return outbox.messages, engine, inbox


def outputs_of(messages: list[FromEngine], name: str) -> list[Output]:
    return [o for m in messages if isinstance(m, Outputs) for o in m.outputs if o.request_id == name]


def tokens_of(messages: list[FromEngine], name: str) -> list[int]:
    return [token for output in outputs_of(messages, name) for token in output.token_ids]


def test_start_reports_progress_then_ready() -> None:
    messages, _, _ = run()
    assert messages[0] == Progress("fake model", 1.0)
    assert isinstance(messages[1], Ready)
    assert messages[1].info.backend == "fake"


def test_sequences_that_come_and_go_get_their_own_tokens() -> None:
    messages, _, _ = run([submit("a")], [submit("b", 40, max_tokens=5)], [], [submit("c", 70)])
    assert tokens_of(messages, "a") == [21, 22, 23]
    assert tokens_of(messages, "b") == [41, 42, 43, 44, 45]
    assert tokens_of(messages, "c") == [71, 72, 73]
    assert [output.finish for output in outputs_of(messages, "a")] == [None, None, FinishReason.LENGTH]


def test_one_message_carries_all_tokens_of_a_step() -> None:
    messages, _, _ = run([submit("a"), submit("b"), submit("c")])
    assert [len(m.outputs) for m in messages if isinstance(m, Outputs)] == [3, 3, 3]


def test_next_step_is_started_before_the_last_is_collected() -> None:
    calls: list[str] = []
    run([submit("a", max_tokens=3)], factory=lambda progress: Recorder(calls, script=count_up))
    assert calls == [
        *("build 0", "start 0", "build 1", "collect 0", "start 1", "build 2", "start 2", "collect 1", "collect 2"),
        *("build 3", "start 3", "collect 3"),  # tells the runner that the slot is free
        "idle",
        "close",
    ]


def test_first_tokens_are_told_before_the_next_step_is_started() -> None:
    calls: list[str] = []

    class Told(ListOutbox):
        def send(self, message: FromEngine) -> None:
            calls.extend(f"tell {output.token_ids}" for output in getattr(message, "outputs", ()))
            super().send(message)

    inbox = ScriptedInbox([submit("a", max_tokens=3)])
    Engine(lambda progress: Recorder(calls, script=count_up), Config(), inbox=inbox, outbox=Told()).run()
    assert calls[calls.index("collect 0") :][:3] == ["collect 0", "tell (21,)", "start 1"]
    assert calls.index("start 2") < calls.index("tell (22,)")


@pytest.mark.parametrize("limits", [{}, {"allowed_token_ids": (21, 22, 23)}], ids=["free", "constrained"])
def test_tokens_are_collected_first_where_that_costs_nothing(
    limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Overlap, "observe", lambda *_: None)
    monkeypatch.setattr(Overlap, "collects_first", True, raising=False)
    monkeypatch.setattr(Overlap, "__init__", lambda self: None)
    calls: list[str] = []
    prompt = submit("a", *range(20), **limits)
    run([prompt], factory=lambda progress: Recorder(calls, script=count_up), prefill_step_size=16)
    between = [calls[calls.index(f"build {i}") + 1 : calls.index(f"start {i}")] for i in range(4)]
    assert between == [[], [], ["collect 1"], ["collect 2"]], "step 0 gives no token"


def note_plans(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note when steps are planned."""
    plan = Scheduler.plan

    def noted(scheduler: Scheduler) -> Step | None:
        step = plan(scheduler)
        calls.extend([] if step is None else [f"plan {step.number}"])
        return step

    monkeypatch.setattr(Scheduler, "plan", noted)


def alike(count: int) -> list[ToEngine]:
    """Prompts that begin with the same five pages of 32 tokens; each has one of its own."""
    return [submit(str(number), *range(160), 200 + number, max_tokens=1) for number in range(count)]


def test_those_who_wait_for_a_prefix_are_planned_before_the_step_that_ends_it_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    note_plans(calls, monkeypatch)
    messages, _, _ = run(alike(3), factory=lambda progress: Recorder(calls), prefill_step_size=128)
    assert calls == [
        *("plan 0", "build 0", "start 0"),
        *("plan 1", "build 1", "plan 2", "start 1", "collect 0"),
        *("build 2", "collect 1", "start 2"),
        *("collect 2", "plan 3", "build 3", "start 3", "collect 3", "idle", "close"),
    ]
    assert [outputs_of(messages, name)[0].num_cached for name in "012"] == [0, 160, 160]


def test_nothing_is_planned_ahead_while_somebody_waits_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    note_plans(calls, monkeypatch)
    crowd = [submit("a", max_tokens=20)], [], alike(3)
    run(*crowd, factory=lambda progress: Recorder(calls), prefill_step_size=128)
    for number in range(1, 10):
        assert calls.index(f"start {number - 1}") < calls.index(f"plan {number}")


def test_aborted_sequence_says_nothing_more() -> None:
    messages, engine, _ = run([submit("a", max_tokens=50)], [], [], [Abort("a"), Abort("unknown")], [submit("b")])
    assert tokens_of(messages, "a") == [21, 22]
    assert tokens_of(messages, "b") == [21, 22, 23]
    assert engine.stats.pages_used == 0


def test_idle_engine_waits_and_says_so_once() -> None:
    messages, engine, inbox = run([submit("a")], [], [], [], [], [], [], [Abort("x")], [Abort("y")])
    idle = [m for m in messages if isinstance(m, Stats) and not m.busy]
    assert [(m.num_steps, m.pages_used) for m in idle] == [(0, 0), (4, 0)]
    assert inbox.num_waits == 1, "each message begins the rest anew"
    assert engine.stats == idle[-1]
    assert engine.step_started_at is None


def test_memory_that_was_dropped_at_rest_is_reported() -> None:
    messages, _, _ = run([submit("a")], factory=lambda progress: Dropper(script=count_up))
    assert [m.memory.cache for m in messages if isinstance(m, Stats) and not m.busy][-2:] == [1000, 0]


def test_refusal_is_told_while_nothing_runs() -> None:
    messages, _, _ = run([Submit("a", Prompt(()), SamplingParams(seed=1))])
    (output,) = outputs_of(messages, "a")
    assert output.finish is FinishReason.ERROR
    assert output.message


def test_rejected_sequence_does_not_disturb_the_others() -> None:
    messages, _, _ = run([submit("a"), submit("b"), submit("c")], max_num_seqs=1, max_waiting=1)
    assert tokens_of(messages, "a") == tokens_of(messages, "b") == [21, 22, 23]
    assert [output.finish for output in outputs_of(messages, "c")] == [FinishReason.REJECTED]


def test_step_in_progress_can_be_seen_from_outside() -> None:
    seen: list[float | None] = []

    class Watched(FakeRunner):
        def collect(self, handle: Any) -> StepResult:
            seen.append(engine.step_started_at)
            return super().collect(handle)

    inbox = ScriptedInbox([submit("a")])
    engine = Engine(lambda progress: Watched(), Config(), inbox=inbox, outbox=ListOutbox())
    engine.run()
    assert len(seen) == 4
    assert None not in seen


def test_shutdown_ends_in_the_middle_and_frees_the_runner() -> None:
    calls: list[str] = []
    messages, _, _ = run([submit("a", max_tokens=50)], [], [Shutdown()], factory=lambda progress: Recorder(calls))
    assert calls[-1] == "close"
    assert not any(isinstance(m, Failed) for m in messages)


# ---- failures ----


def test_model_error_is_told_as_such() -> None:
    def factory(progress: ProgressCallback) -> Runner:
        raise ModelError("no such model")

    messages, _, _ = run(factory=factory)
    assert messages == [Failed("no such model", is_model_error=True)]


def test_any_other_error_while_loading_is_told(logged: pytest.LogCaptureFixture) -> None:
    def factory(progress: ProgressCallback) -> Runner:
        raise MemoryError("too big")

    messages, _, _ = run(factory=factory)
    assert messages == [Failed("MemoryError: too big")]
    assert "Traceback" in logged.text


@pytest.mark.parametrize("where", ["build", "start", "collect"])
def test_failed_step_ends_the_engine(where: str, logged: pytest.LogCaptureFixture) -> None:
    class Failing(FakeRunner):
        def build(self, step: Step) -> Any:
            if where == "build" and step.number == 2:
                raise RuntimeError("device lost")
            return super().build(step)

        def start(self, handle: Any) -> None:
            if where == "start" and handle.step.number == 2:
                raise RuntimeError("device lost")
            super().start(handle)

        def collect(self, handle: Any) -> StepResult:
            result = super().collect(handle)
            if where == "collect" and result.number == 2:
                raise RuntimeError("device lost")
            return result

        def close(self) -> None:
            raise OSError("cannot close either")

    messages, engine, _ = run([submit("a", max_tokens=50)], factory=lambda progress: Failing())
    assert messages[-1] == Failed("RuntimeError: device lost")
    assert "cannot close either" in logged.text
    assert engine.step_started_at is None


def test_result_that_is_not_the_steps_ends_the_engine() -> None:
    class Confused(FakeRunner):
        def collect(self, handle: Any) -> StepResult:
            return StepResult(number=super().collect(handle).number, token_ids=())

    messages, _, _ = run([submit("a")], factory=lambda progress: Confused())
    assert isinstance(messages[-1], Failed)
    assert "step 0 has 1 tokens to come" in messages[-1].reason


def test_log_names_no_token(logged: pytest.LogCaptureFixture) -> None:
    run([submit("a", 12345)])
    assert "12345" not in logged.text
