"""How a step's budget is divided among prompts: short ones do not wait for long ones, and nobody starves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import FinishReason, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.scheduler import Scheduler
from vllm_mlx.kv import tables
from vllm_mlx.kv.manager import KVManager
from vllm_mlx.testing.fake import FakeRunner

PAGE = 4


class Queue:
    """A scheduler whose sequences ask for one token, step by step."""

    def __init__(self, budget: int = 40, *, min_chunk: int = 1, num_pages: int = 4000, **settings: Any) -> None:
        runner = FakeRunner(
            num_pages=num_pages, page_size=PAGE, max_model_len=8000, vocab_size=9000, min_chunk=min_chunk
        )
        config = Config(**{"prefill_step_size": budget, "prefix_cache": False, "max_num_seqs": 64, **settings})
        self.scheduler = Scheduler(runner.info, config, clock=lambda: 0.0)
        self.runner = runner
        self.steps: list[dict[str, int]] = []
        """Prompt tokens of each step by sequence."""
        self._names: dict[int, str] = {}
        self._first: dict[int, str] = {}

    def add(self, name: str, prompt: Sequence[int] | int, *, priority: int = 0, max_tokens: int = 1) -> None:
        number = len(self._first) + 1
        token_ids = (number, *range(100, 99 + prompt)) if isinstance(prompt, int) else tuple(prompt)
        self._first[token_ids[0]] = name
        sampling = SamplingParams(seed=1, temperature=0.0, max_tokens=max_tokens)
        self.scheduler.submit(Submit(name, Prompt(token_ids), sampling, priority))

    def step(self) -> dict[str, int]:
        step = self.scheduler.plan()
        assert step is not None
        self._names.update({new.slot: self._first[new.token_ids[0]] for new in step.new})
        launched = self.runner.launch(step)
        self.scheduler.look_ahead()
        self.scheduler.commit(self.runner.collect(launched))
        self.scheduler.check()
        self.steps.append({self._names[row.slot]: len(row.token_ids) for row in step.prefills})
        return self.steps[-1]

    def steps_until_done(self, name: str) -> int:
        for number in itertools.count(1):
            self.step()
            if any(output.request_id == name and output.finish for output in self.scheduler.take_outputs()):
                return number
        raise AssertionError


def test_short_prompt_is_computed_beside_a_long_one() -> None:
    queue = Queue()
    queue.add("long", 400)
    assert queue.step() == {"long": 40}
    queue.add("short", 7)
    assert queue.step() == {"short": 7, "long": 32}
    assert queue.step() == {"long": 40}


def test_half_of_a_step_is_left_to_the_long_prompt() -> None:
    queue = Queue()
    queue.add("long", 400)
    for number in range(4):
        queue.add(f"short{number}", 10)
    assert queue.step() == {"short0": 10, "short1": 10, "long": 20}
    assert queue.step() == {"short2": 10, "short3": 10, "long": 20}


def test_short_prompts_go_in_the_order_of_arrival() -> None:
    queue = Queue()
    queue.add("long", 400)
    queue.add("first", 30)
    queue.add("second", 4)
    assert [list(queue.step()) for _ in range(2)] == [["first", "long"], ["first", "second", "long"]]


def test_prompts_of_like_length_go_one_after_the_other() -> None:
    queue = Queue()
    queue.add("first", 400)
    queue.add("second", 300)
    assert [queue.step() for _ in range(10)] == [{"first": 40}] * 10


def test_prompt_that_is_finished_in_the_step_shares_nothing_but_the_rest() -> None:
    queue = Queue()
    queue.add("first", 36)
    queue.add("second", 4)
    assert queue.step() == {"first": 36, "second": 4}


def test_lower_priority_takes_nothing_of_a_higher_one() -> None:
    queue = Queue()
    queue.add("urgent", 120, priority=1)
    queue.add("short", 5)
    assert [queue.step() for _ in range(3)] == [{"urgent": 40}] * 3
    assert queue.step() == {"short": 5}


def test_small_budget_is_divided_step_by_step() -> None:
    queue = Queue(8, min_chunk=8)
    queue.add("long", 400)
    for number in range(3):
        queue.add(f"short{number}", 8)
    assert [queue.step() for _ in range(4)] == [{"long": 8}, {"short0": 8}, {"long": 8}, {"short1": 8}]


def test_endless_short_prompts_take_no_more_than_half() -> None:
    queue = Queue()
    queue.add("long", 800)
    for number in range(1000):
        for part in range(3):
            queue.add(f"short{number}.{part}", 20)
        queue.step()
        if any(output.request_id == "long" and output.finish for output in queue.scheduler.take_outputs()):
            break
    assert 20 < number <= 40


def test_what_is_left_of_a_step_goes_to_prompts_that_find_the_most_of_theirs() -> None:
    queue = Queue(prefix_cache=True, min_chunk=20)
    queue.add("first", (1, *range(100, 300)))
    queue.steps_until_done("first")
    for number in range(30):
        queue.add(str(number), (1, *range(100, 299), 5000 + number, 6000))
    steps = [queue.scheduler.plan(), queue.scheduler.plan()]
    assert [sum(len(row.token_ids) for row in step.prefills) for step in steps if step] == [40, 20]


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was looked up so far."""
    names: list[str] = []
    expect = KVManager.expect
    monkeypatch.setattr(
        KVManager, "expect", lambda kv, name, *a, **b: (names.append(name), expect(kv, name, *a, **b))[1]
    )
    return names


def test_those_who_find_the_most_of_theirs_are_not_looked_up_while_nobody_is_let_in(looked_up: list[str]) -> None:
    queue = Queue(prefix_cache=True, min_chunk=20, max_num_seqs=1)
    queue.add("first", (1, *range(100, 300)))
    queue.steps_until_done("first")
    queue.add("running", (2, *range(100, 169)))
    assert queue.step() == {"running": 40}
    for number in range(30):
        queue.add(str(number), (1, *range(100, 299), 5000 + number, 6000))
    looked_up.clear()
    assert queue.step() == {"running": 30}
    assert len(looked_up) < 3


def test_pages_of_those_next_in_line_are_named_while_the_device_is_busy(looked_up: list[str]) -> None:
    queue = Queue(prefix_cache=True, min_chunk=40)
    for number in range(4):
        queue.add(str(number), (1, *range(100, 300), 5000 + number))
    queue.step()
    assert set(looked_up) == {"1", "2", "3"}, "the first is being computed"
    looked_up.clear()
    while queue.scheduler.has_work:
        queue.step()
    assert len(looked_up) < 6, "what is named is not named in each step again"


def test_no_name_is_remembered_of_a_prompt_that_ended_before_its_turn(looked_up: list[str]) -> None:
    queue = Queue(prefix_cache=True, num_pages=50)
    sampling = SamplingParams(seed=1, temperature=0.0, max_tokens=1000)
    resumed = Submit("too long", Prompt((9, 100)), sampling, resume_token_ids=tuple(range(200, 500)))
    queue.scheduler.submit(resumed)
    queue.add("first", 40)
    queue.add("second", 40)
    assert queue.step() == {"first": 40}
    ends = {output.request_id: output.finish for output in queue.scheduler.take_outputs()}
    assert ends["too long"] is FinishReason.LENGTH
    assert looked_up == ["second"]


@settings(max_examples=30, deadline=None)
@given(
    budget=st.integers(1, 60),
    min_chunk=st.integers(1, 30),
    length=st.integers(1, 400),
    sizes=st.lists(st.lists(st.integers(1, 90), max_size=4), min_size=1, max_size=5),
    decodes=st.booleans(),
)
def test_first_prompt_is_never_starved_by_those_behind_it(
    budget: int, min_chunk: int, length: int, sizes: list[list[int]], decodes: bool
) -> None:
    alone, crowded = (Queue(budget, min_chunk=min_chunk) for _ in range(2))
    for queue in (alone, crowded):
        if decodes:
            queue.add("running", 1, max_tokens=4000)
            queue.step()
        queue.add("first", length)
    expected = alone.steps_until_done("first")
    # Half as fast, and chunks that end on pages round that down.
    for number in range(3 * expected + 10):
        for part, size in enumerate(sizes[number % len(sizes)]):
            crowded.add(f"{number}.{part}", size)
        crowded.step()
        if any(output.request_id == "first" and output.finish for output in crowded.scheduler.take_outputs()):
            return
    raise AssertionError(f"{expected} steps alone, and not done after {len(crowded.steps)}")


@pytest.mark.parametrize("num_new", [3, 9])
def test_long_prompt_that_is_found_is_a_short_one(num_new: int) -> None:
    queue = Queue(prefix_cache=True)
    known = list(range(500, 700))
    queue.add("before", known)
    queue.steps_until_done("before")
    queue.add("long", 400)
    queue.step()
    queue.add("again", [*known, *range(num_new)])
    assert queue.step() == {"again": num_new, "long": 40 - num_new - (40 - num_new) % PAGE}


def test_no_prompt_is_hashed_twice_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(prefix_cache=True)
    queue.add("long", 1200)
    queue.add("second", 900)
    queue.add("third", 800)
    hashed: list[int] = []
    page_names = tables.page_names

    def counted(parent: bytes, token_ids: Sequence[int], **given: Any) -> Iterator[bytes]:
        hashed.append(len(token_ids))
        return page_names(parent, token_ids, **given)

    monkeypatch.setattr(tables, "page_names", counted)
    for name in ("long", "second", "third"):
        queue.steps_until_done(name)
    assert sum(hashed) <= 1200 + 900 + 800
    assert max(sum(queue_step.values()) for queue_step in queue.steps) <= 40
