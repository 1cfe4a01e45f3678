"""Whatever arrives and leaves, every sequence gets the tokens that it would get alone, and nothing is lost.

Alone it gets one token at a time; in the worlds below those without a choice may be appended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from forcing import Scripts
from hypothesis import given, settings
from hypothesis import strategies as st
from turns import Turns, Watched

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import FinishReason, Output, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.constraints import Constraints
from vllm_mlx.engine.rounds import Rounds
from vllm_mlx.testing.fake import FakeRunner

VOCAB_SIZE, END = 11, 10
MAX_MODEL_LEN = 48


@dataclass(frozen=True)
class World:
    """A runner and its settings."""

    num_pages: int = 200
    page_size: int = 4
    windows: tuple[int | None, ...] = (None,)
    max_num_seqs: int = 8
    prefill_step_size: int = 64
    step_costs_s: tuple[float, ...] = (0.0,)
    chunked_decode: bool = False
    collects_first: tuple[bool, ...] = (False,)
    """In turns: whether the tokens of the step in flight are taken in before the step built behind it is started."""
    plans_ahead: bool = False


@dataclass(frozen=True)
class Arrival:
    """A sequence, the round it comes in, and how many rounds later nobody wants it any more."""

    at: int
    submit: Submit
    abort_after: int | None = None
    is_aborted_late: bool = False
    """Once the step of that round is planned."""


@dataclass
class Loop:
    """The engine's rounds on the calling thread, checked in every one."""

    world: World
    outputs: dict[str, list[Output]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        w = self.world
        self.runner = FakeRunner(
            num_pages=w.num_pages,
            page_size=w.page_size,
            windows=w.windows,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            chunked_decode=w.chunked_decode,
        )
        self.constraints = Constraints(lambda size: Scripts(size, end=END), vocab_size=VOCAB_SIZE)
        config = Config(max_num_seqs=w.max_num_seqs, prefill_step_size=w.prefill_step_size)
        self.scheduler = Watched(self.runner.info, config, constraints=self.constraints, clock=lambda: 0.0)
        self.scheduler.costs_s, self.scheduler.plans_ahead = w.step_costs_s, w.plans_ahead
        self.rounds = Rounds(
            self.scheduler, self.runner, self.constraints, tell=self.tell, overlap=Turns(w.collects_first)
        )
        self.num_rounds = 0

    def submit(self, submit: Submit) -> None:
        """The grammar is there at once, so that nothing depends on threads."""
        self.scheduler.submit(submit)
        while not all(sequence.is_prepared for sequence in self.scheduler._waiting):
            time.sleep(0)

    def round(self, late_aborts: Sequence[str] = ()) -> None:
        self.scheduler.late_aborts = late_aborts
        had_in_flight, num_steps = self.rounds.has_in_flight, len(self.scheduler.steps)
        self.rounds.round()
        has_done = had_in_flight or len(self.scheduler.steps) > num_steps
        assert has_done or not self.scheduler.has_work, "work, but no step"
        self.tell()
        self.num_rounds += 1

    def tell(self) -> None:
        for output in self.scheduler.take_outputs():
            self.outputs.setdefault(output.request_id, []).append(output)

    def run(self, arrivals: list[Arrival]) -> None:
        last = max((a.at + (a.abort_after or 0) for a in arrivals), default=0)
        while self.scheduler.has_work or self.rounds.has_in_flight or self.num_rounds <= last:
            late_aborts = []
            for arrival in arrivals:
                name = arrival.submit.request_id
                if arrival.at == self.num_rounds:
                    self.submit(arrival.submit)
                if arrival.abort_after is not None and arrival.at + arrival.abort_after == self.num_rounds:
                    late_aborts += [name] if arrival.is_aborted_late else []
                    if not arrival.is_aborted_late:
                        self.scheduler.abort(name)
            self.round(late_aborts)
            assert self.num_rounds < 20_000, "somebody starves"
        self.close()

    def close(self) -> None:
        """End the threads, if there are any."""
        self.constraints.__exit__()

    def tokens(self, name: str) -> tuple[int, ...]:
        return tuple(token for output in self.outputs.get(name, []) for token in output.token_ids)

    def finish(self, name: str) -> FinishReason | None:
        reasons = [output.finish for output in self.outputs.get(name, [])]
        assert None not in reasons[-1:], "not finished"
        assert reasons[:-1] == [None] * len(reasons[:-1]), "told more after the end"
        return reasons[-1] if reasons else None


def alone(submit: Submit, world: World) -> tuple[tuple[int, ...], FinishReason | None]:
    loop = Loop(World(num_pages=world.num_pages, page_size=world.page_size, windows=world.windows))
    loop.run([Arrival(0, submit)])
    return loop.tokens(submit.request_id), loop.finish(submit.request_id)


worlds = st.builds(
    World,
    num_pages=st.one_of(st.just(0), st.integers(4, 24)),
    page_size=st.sampled_from([1, 2, 4, 8]),
    windows=st.sampled_from([(None,), (None,), (5,), (None, 5), (9, None, 2)]),
    max_num_seqs=st.integers(1, 5),
    prefill_step_size=st.integers(1, 40),
    step_costs_s=st.lists(st.floats(0, 3), min_size=1, max_size=3).map(tuple),
    chunked_decode=st.booleans(),
    collects_first=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple),
    plans_ahead=st.booleans(),
)

scripts = st.lists(st.one_of(st.none(), st.integers(0, END), st.integers(0, END)), max_size=30).map(
    lambda tokens: " ".join("?" if token is None else str(token) for token in tokens)
)
"""Outputs of which about two thirds are forced."""

sampling = st.builds(
    SamplingParams,
    seed=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 1.0]),
    max_tokens=st.one_of(st.none(), st.integers(1, 30)),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.sampled_from([(), (), (3,), (3, 5)]),
    logprobs=st.sampled_from([None, None, 2]),
    grammar=st.one_of(st.none(), scripts),
)


texts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40)


@st.composite
def traffic(draw: st.DrawFn) -> list[Arrival]:
    """Most prompts begin like one of two others."""
    arrivals = []
    stems = [draw(texts), draw(texts)]
    for number in range(draw(st.integers(1, 9))):
        begins = draw(st.sampled_from([*stems, []]))[: draw(st.sampled_from([40, 40, 12, 7]))]
        submit = Submit(
            f"s{number}",
            Prompt(tuple([*begins, *draw(texts)][:40])),
            draw(sampling),
            draw(st.integers(-1, 1)),
        )
        abort_after = draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 20)))
        arrivals.append(Arrival(draw(st.integers(0, 12)), submit, abort_after, draw(st.booleans())))
    return arrivals


@settings(max_examples=80, deadline=None)
@given(world=worlds, arrivals=traffic())
def test_everyone_gets_the_tokens_of_a_lone_run(world: World, arrivals: list[Arrival]) -> None:
    loop = Loop(world)
    loop.run(arrivals)
    for arrival in arrivals:
        name = arrival.submit.request_id
        tokens, finish = alone(arrival.submit, world)
        if arrival.abort_after is None:
            assert (loop.tokens(name), loop.finish(name)) == (tokens, finish)
        else:
            assert loop.tokens(name) == tokens[: len(loop.tokens(name))]
    stats = loop.scheduler.stats()
    assert (stats.pages_used, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert loop.runner.live_slots == ()


@settings(max_examples=40, deadline=None)
@given(world=worlds, arrivals=traffic(), died_in=st.integers(1, 25))
def test_resubmitted_sequences_go_on_as_if_nothing_had_happened(
    world: World, arrivals: list[Arrival], died_in: int
) -> None:
    first = Loop(world)
    for arrival in arrivals:
        first.submit(arrival.submit)
    for _ in range(died_in):
        first.round()
    first.close()
    second = Loop(world)
    for arrival in arrivals:
        name = arrival.submit.request_id
        if not any(output.finish for output in first.outputs.get(name, [])):
            second.submit(msgspec.structs.replace(arrival.submit, resume_token_ids=first.tokens(name)))
    second.run([])
    for arrival in arrivals:
        name = arrival.submit.request_id
        assert first.tokens(name) + second.tokens(name) == alone(arrival.submit, world)[0]


crowd = [
    Arrival(number, Submit(f"s{number}", Prompt((number,) * 9), SamplingParams(seed=1, max_tokens=20)))
    for number in range(4)
]


def test_tiny_pool_preempts() -> None:
    """The random worlds above do reach preemption: this one surely does."""
    loop = Loop(World(num_pages=12, page_size=4))
    loop.run(crowd)
    assert loop.scheduler.stats().num_preemptions > 0
    for arrival in crowd:
        assert loop.tokens(arrival.submit.request_id) == alone(arrival.submit, World())[0]
        assert len(loop.tokens(arrival.submit.request_id)) == 20
