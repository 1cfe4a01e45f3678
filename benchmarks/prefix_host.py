"""What the prefix cache costs the host: matching a long prompt, memory for each page, and arrivals. No MLX.

    python benchmarks/prefix_host.py [--turns] [--arrivals [--prefix 8000] [--suffix 100] [--rows 64] [--rounds 7]]

With `--arrivals`: many requests that begin alike come at once. Each is sent through the sockets that a server and its
engine have, submitted, admitted, and planned until it has its first token; results are made up, since there is no
runner. What a step does on the device is not in it. Each round has a prefix of its own, first computed by one of the
requests while the others wait, then found by all of another set.

With `--turns`: the turns of one conversation of 20,000 tokens and one of 100,000, the system text and the last message
marked to be kept; what the manager takes before the first token, and between that token and telling it.

Compare two trees with PYTHONPATH, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import tempfile
import time
import tracemalloc
from array import array
from collections.abc import Callable, Sequence

import msgspec
import zmq

from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import FromEngine, Outputs, Submit, ToEngine
from vllm_mlx.core.prompt import BLOCK_TOKENS, Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import RunnerInfo, Step, StepResult
from vllm_mlx.engine import child
from vllm_mlx.engine.scheduler import Scheduler
from vllm_mlx.engine.transport import ServerChannel, SocketInbox
from vllm_mlx.kv.manager import Admitted, KVManager

PAGE_SIZE = 32
VOCAB_SIZE = 50_000
PROMPT_TOKENS = 100_000
CACHED_PAGES = 12_500
REPETITIONS = 25
POOL_PAGES = 1_000_000
POOL_PROMPT_PAGES = 1_000


class HostCost(msgspec.Struct, frozen=True):
    """Medians in milliseconds, and bytes."""

    lookup_hit_ms: float
    """All pages of the prompt are remembered."""
    admit_hit_ms: float
    admit_miss_ms: float
    """None of them is."""
    release_ms: float
    pool_bytes_per_page: float
    """All pages remembered, each prompt with a last page that is not full."""


def measure_host() -> HostCost:
    """Everything, in some tens of seconds."""
    return HostCost(*_matching(), pool_bytes_per_page=_bytes_per_page())


def _prompt(draw: random.Random, num_tokens: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(VOCAB_SIZE), k=num_tokens))


def _remember(manager: KVManager, name: str, token_ids: tuple[int, ...]) -> None:
    """As if it had been computed."""
    admitted = manager.admit(name, token_ids, num_tokens=len(token_ids))
    assert isinstance(admitted, Admitted), admitted
    manager.commit(name, token_ids, num_computed=len(token_ids))
    manager.release(name, token_ids)
    manager.take_orders(max_exports=0)


def _matching() -> tuple[float, float, float, float]:
    """Milliseconds of `lookup` and of `admit` with all found, of `admit` with nothing found, and of `release`."""
    draw = random.Random(0)
    num_prompt_pages = -(-PROMPT_TOKENS // PAGE_SIZE)
    manager = KVManager(CACHED_PAGES + 2 * num_prompt_pages, page_size=PAGE_SIZE)
    prompt = _prompt(draw, PROMPT_TOKENS)
    _remember(manager, "the prompt", prompt)
    for number in range(CACHED_PAGES // num_prompt_pages - 1):
        _remember(manager, f"{number}", _prompt(draw, PROMPT_TOKENS))
    rounds = [_once(manager, prompt, _prompt(draw, PROMPT_TOKENS)) for _ in range(REPETITIONS)]
    lookup, admit, missed, release = (1000 * statistics.median(column) for column in zip(*rounds, strict=True))
    return lookup, admit, missed, release


def _once(manager: KVManager, known: tuple[int, ...], other: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Seconds of each, once."""
    lookup_s = _timed(lambda: manager.lookup(known))
    admit_s = _timed(lambda: manager.admit("known", known, num_tokens=PROMPT_TOKENS))
    release_s = _timed(lambda: manager.release("known", known))
    missed_s = _timed(lambda: manager.admit("other", other, num_tokens=PROMPT_TOKENS))
    manager.release("other")
    manager.take_orders(max_exports=0)
    return lookup_s, admit_s, missed_s, release_s


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _bytes_per_page() -> float:
    """Of a manager whose pages are all remembered."""
    draw = random.Random(1)
    num_tokens = POOL_PROMPT_PAGES * PAGE_SIZE - PAGE_SIZE // 2
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    manager = KVManager(POOL_PAGES + 1, page_size=PAGE_SIZE)
    for number in range(POOL_PAGES // POOL_PROMPT_PAGES):
        _remember(manager, f"{number}", _prompt(draw, num_tokens))
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert manager.figures().pages_kept == POOL_PAGES
    return held / POOL_PAGES


# ---- turns ----


def measure_turns(num_tokens: int, *, num_new: int = 230, num_turns: int = 25) -> str:
    """Medians of milliseconds of processor time, as a line."""
    draw, columns = random.Random(0), []
    manager = KVManager(4 * num_tokens // PAGE_SIZE, page_size=PAGE_SIZE)
    token_ids = _prompt(draw, num_tokens)
    for _ in range(num_turns):
        token_ids += _prompt(draw, num_new)
        keeps = ((num_tokens, 300), (len(token_ids) - 4, 300))
        blocks = tuple(range(len(token_ids) // BLOCK_TOKENS))  # as whoever reads them from a socket numbers them
        begun = time.thread_time()
        manager.admit("turn", token_ids, num_tokens=len(token_ids) + 1, keeps=keeps, blocks=blocks)
        admitted = time.thread_time()
        manager.commit("turn", token_ids, num_computed=len(token_ids))
        committed = time.thread_time()
        manager.release("turn", token_ids)
        columns.append((admitted - begun, committed - admitted, time.thread_time() - committed))
        manager.take_orders(max_exports=0)
    admit, commit, release = (1000 * statistics.median(column) for column in zip(*columns[1:], strict=True))
    return f"{num_tokens} tokens: admit {admit:.2f} ms, commit {commit:.2f} ms, release {release:.2f} ms"


# ---- arrivals ----


class Arrival(msgspec.Struct, frozen=True):
    """Milliseconds of processor time for all requests of a round together."""

    send: float
    """In the server's process: messages to bytes, bytes to the socket."""
    receive: float
    """On the engine's thread, as all that follows: bytes to messages."""
    submit: float
    plan: float
    """All steps until everybody has a first token: names, look-ups, admission, page tables, rows."""
    commit: float
    """The same steps' results, and their outputs as bytes."""

    @property
    def engine(self) -> float:
        """All that the engine's thread does."""
        return self.receive + self.submit + self.plan + self.commit


def _worked(call: Callable[[], object]) -> float:
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


class Arrivals:
    """A server's end and an engine's, without device, in one process."""

    def __init__(self, *, prefix: int, suffix: int, rows: int) -> None:
        self._prefix, self._suffix, self._rows = prefix, suffix, rows
        length = prefix + suffix + 4 * PAGE_SIZE
        info = RunnerInfo(
            vocab_size=VOCAB_SIZE,
            max_model_len=length,
            num_pages=1 + 4 * (length + 2 * rows * suffix) // PAGE_SIZE + 8 * rows,
            cache=CacheSpec(layers=(LayerSpec(Layout.PAGES),), page_size=PAGE_SIZE, page_bytes=4 * PAGE_SIZE),
            backend="fake",
            device="none",
            dtype="none",
            min_chunk=512,  # as on a GPU
        )
        self._scheduler = Scheduler(info, Config(max_num_seqs=rows))
        self._encode = msgspec.msgpack.Encoder().encode
        self._draw = random.Random(0)

    async def run(self, rounds: int) -> tuple[list[Arrival], list[Arrival]]:
        """With a prefix that one of the requests computes, and with the same prefix found; the first round warms up."""
        with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
            inbox = SocketInbox(context, folder)
            channel = ServerChannel(folder, _ignored)
            try:
                found = [self._round(channel, inbox, number) for number in range(rounds + 1)]
            finally:
                channel.close()
                inbox.close()
        return [first for first, _ in found[1:]], [second for _, second in found[1:]]

    def _round(self, channel: ServerChannel, inbox: SocketInbox, number: int) -> tuple[Arrival, Arrival]:
        prefix = _prompt(self._draw, self._prefix)
        return (
            self._arrive(channel, inbox, self._submits(f"{number} new", prefix)),
            self._arrive(channel, inbox, self._submits(f"{number} found", prefix)),
        )

    def _submits(self, name: str, prefix: tuple[int, ...]) -> list[Submit]:
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=64, ignore_eos=True)
        # Through an array, so that prompts do not share the objects of their numbers: a tokenizer's do not.
        prompts = [tuple(array("i", (*prefix, *_prompt(self._draw, self._suffix)))) for _ in range(self._rows)]
        return [Submit(f"{name} {i}", Prompt(prompt), sampling) for i, prompt in enumerate(prompts)]

    def _arrive(self, channel: ServerChannel, inbox: SocketInbox, submits: Sequence[Submit]) -> Arrival:
        gc.collect()
        gc.freeze()  # as an engine does once it has loaded
        messages: list[ToEngine] = []
        send_s = _worked(lambda: [channel.send(submit) for submit in submits])
        time.sleep(0.2)  # ZeroMQ's threads have passed everything on
        receive_s = _worked(lambda: messages.extend(inbox.receive(None)))
        assert len(messages) == len(submits)
        received = [message for message in messages if isinstance(message, Submit)]
        submit_s = _worked(lambda: [self._scheduler.submit(message) for message in received])
        plan_s, commit_s = self._first_tokens(len(submits))
        self._finish()
        gc.unfreeze()
        return Arrival(*(1000 * seconds for seconds in (send_s, receive_s, submit_s, plan_s, commit_s)))

    def _first_tokens(self, num_sequences: int) -> tuple[float, float]:
        """Seconds of planning and of committing until so many have a token. A step is planned before the one before it
        is committed, as in the engine."""
        plan_s = commit_s = 0.0
        in_flight: Step | None = None
        told: set[str] = set()
        while len(told) < num_sequences:
            begun = time.thread_time()
            step = self._scheduler.plan()
            planned = time.thread_time()
            if in_flight is not None:
                self._scheduler.commit(_result(in_flight))
            outputs = Outputs(self._scheduler.take_outputs())
            self._encode(outputs)
            done = time.thread_time()
            told.update(output.request_id for output in outputs.outputs if output.token_ids)
            plan_s, commit_s = plan_s + planned - begun, commit_s + done - planned
            in_flight = step
        if in_flight is not None:
            self._scheduler.commit(_result(in_flight))
        return plan_s, commit_s

    def _finish(self) -> None:
        while self._scheduler.has_work:
            step = self._scheduler.plan()
            if step is not None:
                self._scheduler.commit(_result(step))
        self._scheduler.take_outputs()


def _ignored(message: FromEngine) -> None:
    """This engine says nothing through the sockets."""


def _result(step: Step) -> StepResult:
    return StepResult(step.number, (7,) * len(step.sampled_slots), elapsed_s=0.005)


def measure_arrivals(given: argparse.Namespace) -> None:
    """Print the parts of the round that took the engine's thread least: what else is there makes rounds slower only."""
    if hasattr(child, "collect_seldom"):  # trees may be compared that have no such thing
        child.collect_seldom()
    arrivals = Arrivals(prefix=given.prefix, suffix=given.suffix, rows=given.rows)
    both = asyncio.run(arrivals.run(given.rounds))
    print(f"{given.rows} requests, {given.prefix} tokens alike and {given.suffix} of their own")
    print("milliseconds of processor time of the thread, the quietest round")
    print(f"{'':34}" + "".join(f"{part:>9}" for part in (*Arrival.__struct_fields__, "engine")))
    for name, rounds in zip(("prefix computed by one of them", "prefix found by all"), both, strict=True):
        columns = [[*msgspec.structs.astuple(each), each.engine] for each in rounds]
        quietest = min(columns, key=lambda column: column[-1])
        print(f"{name:34}" + "".join(f"{value:9.1f}" for value in quietest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrivals", action="store_true")
    parser.add_argument("--turns", action="store_true")
    parser.add_argument("--prefix", type=int, default=8000)
    parser.add_argument("--suffix", type=int, default=100)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    if given.arrivals:
        measure_arrivals(given)
    elif given.turns:
        print(measure_turns(20_000), measure_turns(100_000), sep="\n")
    else:
        print(measure_host())


if __name__ == "__main__":
    main()
