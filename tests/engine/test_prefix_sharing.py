"""Sequences that share a prefix compute it once, and get the tokens that they would get without any sharing."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Output, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.scheduler import Scheduler
from vllm_mlx.testing.fake import FakeRunner

PAGE = 4
VOCAB_SIZE = 7


class World:
    """Scheduler and runner in the order of the engine loop; counts the tokens that are computed."""

    def __init__(self, *, num_pages: int = 64, **given: Any) -> None:
        self.runner = FakeRunner(num_pages=num_pages, page_size=PAGE, vocab_size=VOCAB_SIZE, max_model_len=64)
        self.scheduler = Scheduler(self.runner.info, Config(**{"prefill_step_size": 8, **given}), clock=lambda: 0.0)
        self.in_flight: Any = None
        self.num_prefilled = 0
        self.outputs: dict[str, list[Output]] = {}

    def round(self) -> None:
        step = self.scheduler.plan()
        launched = self.runner.launch(step) if step else None
        self.num_prefilled += sum(len(row.token_ids) for row in step.prefills) if step else 0
        if self.in_flight:
            self.scheduler.commit(self.runner.collect(self.in_flight))
        self.in_flight = launched
        self.scheduler.check()
        for output in self.scheduler.take_outputs():
            self.outputs.setdefault(output.request_id, []).append(output)

    def run(self, *submits: Submit) -> None:
        for one in submits:
            self.scheduler.submit(one)
        while self.scheduler.has_work or self.in_flight:
            self.round()

    def tokens(self, name: str) -> tuple[int, ...]:
        return tuple(token for output in self.outputs[name] for token in output.token_ids)

    def num_cached(self, name: str) -> int:
        return self.outputs[name][0].num_cached


def submit(name: str, token_ids: Any, *, max_tokens: int = 6, salt: bytes = b"", seed: int = 1) -> Submit:
    sampling = SamplingParams(temperature=0.8, seed=seed, max_tokens=max_tokens)
    return Submit(name, Prompt(tuple(token % VOCAB_SIZE for token in token_ids), salt), sampling)


def test_the_same_prompt_again_computes_only_its_end() -> None:
    world = World()
    world.run(submit("a", range(22)))
    assert world.num_prefilled == 22
    world.run(submit("b", range(22)))
    assert world.num_prefilled == 22 + 2
    assert (world.num_cached("a"), world.num_cached("b")) == (0, 20)
    assert world.tokens("a") == world.tokens("b")


def test_the_next_turn_of_a_chat_finds_the_answer_too() -> None:
    world = World()
    world.run(submit("a", range(10), max_tokens=12))
    history = [*(token % VOCAB_SIZE for token in range(10)), *world.tokens("a")]
    world.run(submit("b", [*history, 1, 2, 3]))
    assert world.num_cached("b") == 20


def test_two_prompts_that_arrive_together_compute_their_prefix_once() -> None:
    world = World()
    world.run(submit("a", range(20)), submit("b", [*range(17), 5, 5, 5, 5]), submit("c", range(20), seed=9))
    assert world.num_cached("b") == world.num_cached("c") == 16
    assert world.num_prefilled == 20 + 5 + 4


def test_an_unrelated_prompt_overtakes_one_that_waits_for_its_prefix() -> None:
    world = World(prefill_step_size=48)
    for one in (submit("a", range(40)), submit("b", range(40)), submit("other", [3] * 3, max_tokens=1)):
        world.scheduler.submit(one)
    while not any(output.token_ids for output in world.outputs.get("a", [])):
        world.round()
    assert "other" in world.outputs
    assert "b" not in world.outputs
    world.run()


def test_a_prefix_survives_the_abort_of_those_that_computed_it() -> None:
    world = World()
    world.scheduler.submit(submit("a", range(40), max_tokens=20))
    while not any(output.token_ids for output in world.outputs.get("a", [])):
        world.round()
    world.scheduler.abort("a")
    world.run(submit("b", range(40)))
    assert world.num_cached("b") == 36


def test_an_aborted_owner_holds_nobody_up() -> None:
    world = World()
    for name in "ab":
        world.scheduler.submit(submit(name, range(40)))
    world.round()
    world.scheduler.abort("a")
    world.run()
    assert len(world.tokens("b")) == 6


def test_other_tenants_share_nothing() -> None:
    world = World()
    world.run(submit("a", range(22), salt=b"one"), submit("b", range(22), salt=b"two"))
    assert (world.num_cached("b"), world.num_prefilled) == (0, 44)


def test_models_with_other_layers_share_nothing() -> None:
    world = World(num_pages=0)
    world.run(submit("a", range(22)))
    world.run(submit("b", range(22)))
    assert world.num_cached("b") == 0


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    world = World(num_pages=13)
    world.run(*(submit(str(i), [i, *range(14)], max_tokens=14) for i in range(3)))
    assert world.scheduler.stats().num_preemptions > 0
    assert world.num_prefilled < 45 + 15 * world.scheduler.stats().num_preemptions


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=40)
arrivals = st.lists(
    st.tuples(prompts, st.integers(1, 12), st.integers(0, 2), st.sampled_from([b"", b"x"])), min_size=1, max_size=12
)


@settings(max_examples=120, deadline=None)
@given(arrivals=arrivals, gaps=st.lists(st.integers(0, 6), min_size=12, max_size=12), num_pages=st.integers(14, 40))
def test_sharing_changes_no_token(
    arrivals: list[tuple[list[int], int, int, bytes]], gaps: list[int], num_pages: int
) -> None:
    worlds = [World(num_pages=num_pages, prefix_cache=shared, max_num_seqs=3) for shared in (True, False)]
    for world in worlds:
        for i, (prompt, max_tokens, seed, salt) in enumerate(arrivals):
            world.scheduler.submit(submit(str(i), prompt, max_tokens=max_tokens, seed=seed, salt=salt))
            for _ in range(gaps[i]):
                world.round()
        world.run()
    sharing, alone = worlds
    assert {name: sharing.tokens(name) for name in sharing.outputs} == {
        name: alone.tokens(name) for name in alone.outputs
    }
    assert sharing.num_prefilled <= alone.num_prefilled + sum(len(prompt) for prompt, *_ in arrivals)
