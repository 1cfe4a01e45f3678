"""Which sequence computes what in the next step."""

from __future__ import annotations

import heapq
import itertools
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from functools import partial
from operator import attrgetter

import msgspec

from vllm_mlx.core.config import Config
from vllm_mlx.core.log import fields, get_logger
from vllm_mlx.core.messages import CacheFreed, CacheMatch, FinishReason, Output, Stats, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.step import DecodeRow, RunnerInfo, Step, StepResult, TokenLogprobs
from vllm_mlx.engine.constraints import Constraints
from vllm_mlx.engine.draft import Draft, Launched
from vllm_mlx.engine.pace import PrefillPace
from vllm_mlx.engine.prefills import Prefills
from vllm_mlx.engine.sequence import Sequence, max_len, refusal
from vllm_mlx.engine.vocabulary import Vocabulary
from vllm_mlx.kv.build import manager_of
from vllm_mlx.kv.disk import DiskCache
from vllm_mlx.kv.manager import Admission

log = get_logger("engine")
MAX_EXPORTS, MAX_IDLE_EXPORTS = 2, 16
"""Pages that leave for the disk in a step that has other work, and in one that has none."""
_order = attrgetter("order")


class Scheduler:
    """Turns sequences into steps, and results into outputs. Pure Python; one thread.

    `plan()` looks at counts only, so a step can be planned while the tokens of the one before are unknown. Steps must
    be launched and committed in the order planned. A sequence that ended may still have a row in the step in flight:
    its token is dropped, and its slot is among the `released` of the next step. Steps are carried out in order, so its
    pages and slot can be handed out at once.
    """

    def __init__(
        self,
        info: RunnerInfo,
        config: Config,
        *,
        disk: DiskCache | None = None,
        constraints: Constraints | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._info = info
        self._max_sequences = config.max_num_seqs + config.max_waiting
        self._max_rows = config.max_num_seqs
        self._vocabulary = Vocabulary(info.vocab_size)
        self._page_size = info.cache.page_size
        self._clock = clock
        self._constraints = constraints or Constraints(None, vocab_size=info.vocab_size)
        self._kv = manager_of(info, config, disk=disk, clock=clock)
        self._pace = PrefillPace(
            config.prefill_step_size, stall_s=config.decode_stall_ms / 1000, min_tokens=info.min_chunk
        )
        self._prefills = Prefills(self._kv, self._pace, page_size=self._page_size)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._free_slots = list(range(config.max_num_seqs))
        self._released: list[int] = []
        self._launched: deque[Launched] = deque()
        self._outputs: list[Output] = []
        self._num_arrived = 0
        self._num_planned = 0
        self._num_tokens = 0
        self._num_preemptions = 0
        self._has_preempted = False  # for the step planned last

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished or the runner must still be told of something."""
        return bool(self._sequences or self._released or self._kv.has_orders)

    def abort_all(self) -> None:
        """Forget all sequences."""
        for request_id in list(self._sequences):
            self.abort(request_id)

    @property
    def waits_for_threads(self) -> bool:
        """Whether all that can be done now is to look again whether a disk or grammar is ready."""
        is_idle = bool(self._waiting) and not self._running
        return is_idle and (self._kv.num_reading > 0 or not all(each.is_prepared for each in self._waiting))

    def stats(self) -> Stats:
        """The scheduler's part of `Stats`."""
        return msgspec.structs.replace(
            self._kv.figures(),
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_preemptions=self._num_preemptions,
            num_steps=self._num_planned,
            num_tokens=self._num_tokens,
        )

    def lookup(self, prompt: Prompt) -> CacheMatch:
        """What the prompt would find if it were submitted now."""
        num_memory, num_stored = self._kv.lookup(prompt.token_ids, salt=prompt.salt)
        return CacheMatch(len(prompt), num_memory=num_memory, num_stored=num_stored, page_size=self._page_size)

    def forget(self) -> CacheFreed:
        """Drop all remembered prefixes; those that running sequences use are not found any more either."""
        return self._kv.forget()

    def take_outputs(self) -> tuple[Output, ...]:
        """What there is to tell since the last call."""
        outputs, self._outputs = tuple(self._outputs), []
        return outputs

    def check(self) -> None:
        """Raise AssertionError if pages or slots are lost or counted twice. For tests."""
        self._kv.check()
        slots = [sequence.slot for sequence in self._running]
        assert None not in slots, "a running sequence has no slot"
        assert all(sequence.slot is None for sequence in self._waiting), "a waiting sequence has a slot"
        assert len(set(slots)) == len(slots), "a slot is given twice"
        assert not set(slots) & set(self._free_slots), "a slot is both free and used"
        assert {*self._sequences.values()} == {*self._running, *self._waiting}, "a sequence is lost"
        if not self._running:
            assert self._kv.num_used == self._kv.num_pinned, "pages are used by nobody"

    # ---- arrivals and departures ----

    def submit(self, submit: Submit) -> None:
        """Queue a sequence, or say in its only output why it cannot be served."""
        message = self._refuse(submit)
        if message:
            self._outputs.append(Output(submit.request_id, finish=FinishReason.ERROR, message=message))
            return
        # Resumed sequences were admitted before: a restart must not turn them away.
        if not submit.resume_token_ids and len(self._sequences) >= self._max_sequences:
            message = "The waiting queue is full; try again later."
            self._outputs.append(Output(submit.request_id, finish=FinishReason.REJECTED, message=message))
            return
        self._num_arrived += 1
        sequence = Sequence(submit, self._num_arrived, self._clock(), max_len(submit, self._info))
        if sequence.sampling.is_constrained:
            sequence.constraint = self._constraints.begin(sequence.sampling, sequence.token_ids[sequence.num_prompt :])
        if reason := sequence.finish_reason():
            self._outputs.append(Output(submit.request_id, finish=reason))
            return
        self._sequences[submit.request_id] = sequence
        insort(self._waiting, sequence, key=_order)

    def abort(self, request_id: str) -> None:
        """Forget a sequence at once; nothing is told. Unknown ids are ignored."""
        if sequence := self._sequences.get(request_id):
            self._end(sequence)

    def _refuse(self, submit: Submit) -> str | None:
        """Why the sequence cannot be taken, for the caller; None if it can."""
        if submit.request_id in self._sequences:
            return f"A sequence named {submit.request_id!r} is running already."
        reason, prompt = refusal(submit, self._info, self._vocabulary), submit.prompt
        if reason is None and not self._kv.could_fit(len(prompt), token_ids=prompt.token_ids, salt=prompt.salt):
            return f"The prompt has {len(prompt)} tokens; the KV cache has room for {self._kv.most_tokens}."
        return reason

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the running ones."""
        assert sequence.slot is not None
        self._running.remove(sequence)
        self._kv.release(sequence.request_id, sequence.token_ids)
        heapq.heappush(self._free_slots, sequence.slot)
        self._released.append(sequence.slot)
        sequence.slot = None

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; it keeps its tokens, and those on their way to it."""
        self._leave(sequence)
        sequence.num_computed, sequence.num_found = 0, None
        sequence.was_preempted = self._has_preempted = True
        insort(self._waiting, sequence, key=_order)
        self._num_preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence. A row that it has in flight finds it finished."""
        sequence.is_finished = True
        del self._sequences[sequence.request_id]
        if sequence.slot is None:
            self._waiting.remove(sequence)
            self._kv.release(sequence.request_id)
        else:
            self._leave(sequence)

    def _fail(self, sequence: Sequence) -> None:
        """End a sequence whose constraint cannot be followed."""
        self._end(sequence)
        self._outputs.append(Output(sequence.request_id, finish=FinishReason.ERROR, message=sequence.problem))

    def _end_for_want_of_pages(self, sequence: Sequence) -> None:
        """The pool is too small for one more token."""
        details = fields(id=sequence.request_id, tokens=len(sequence.token_ids), pages=self._kv.num_usable)
        log.warning("the KV cache is too small for a sequence, which ends early", extra=details)
        self._end(sequence)
        self._outputs.append(Output(sequence.request_id, finish=FinishReason.LENGTH))

    # ---- planning ----

    def plan(self) -> Step | None:
        """The next step, or None if nothing can be computed before the step in flight is committed.

        When the last sequence has ended, a step without rows tells the runner so.
        """
        draft = Draft()
        self._has_preempted = False
        self._plan_decodes(draft)
        # A preempted sequence may have a token in flight: nobody is admitted before that has arrived.
        waiting = [] if self._has_preempted else self._ready()
        self._plan_prefills(draft, waiting)
        self._outputs += draft.outputs
        if not draft.rows and not self._kv.has_orders and (self._running or not self._released):
            return None
        orders = self._kv.take_orders(max_exports=MAX_EXPORTS if draft.rows else MAX_IDLE_EXPORTS)
        launched = draft.launched(self._num_planned, released=self._released, orders=orders)
        self._released.clear()
        self._num_planned += 1
        self._num_tokens += launched.step.num_tokens
        self._launched.append(launched)
        for row in launched.prompts:
            known = row.sequence.token_ids
            self._kv.publish(row.sequence.request_id, known, num_computed=row.num_computed)
        return launched.step

    def look_ahead(self) -> None:
        """While the device computes prompts: do what would keep it waiting when the next sequences are let in."""
        if self._launched and self._launched[-1].step.prefills:
            self._prefills.name_ahead(self._waiting, most=len(self._free_slots))

    def _ready(self) -> list[Sequence]:
        """Waiting sequences that can be begun; those whose grammar turns out not to work end here."""
        for sequence in [each for each in self._waiting if each.problem]:
            self._fail(sequence)
        return [sequence for sequence in self._waiting if sequence.is_prepared]

    def _plan_decodes(self, draft: Draft) -> None:
        """A row for every sequence that can decode and whose next token has a page; who prefills gets a page, too."""
        num_spare = self._max_rows - len(self._running) if self._info.chunked_decode else 0
        for sequence in tuple(self._running):
            can_decode = sequence.can_decode
            if sequence.slot is None or not (can_decode or sequence.is_prefilling):
                continue
            if not self._make_room(sequence) or not can_decode:
                continue
            if sequence.has_chunk and self._info.chunked_decode:
                num_spare -= self._plan_chunk(sequence, draft, max_rows=1 + num_spare) - 1
                continue
            page_ids, others = self._kv.row_tables(sequence.request_id)
            draft.decodes.append(DecodeRow(sequence.slot, sequence.num_computed, page_ids, others))
            draft.add(sequence, 1, samples=True)
            draft.take_checkpoint(self._kv, sequence)

    def _plan_chunk(self, sequence: Sequence, draft: Draft, *, max_rows: int) -> int:
        """Append what must follow, and plan rows of all that is not computed; returns how many, at least one.

        Pages are taken as far as there are free ones, and tokens as far as they would go one by one. No row is needed
        if the sequence has all its tokens by now; its first one is kept free.
        """
        following, start = sequence.following, sequence.num_computed
        num_wanted = min(sequence.num_tokens + len(following), sequence.max_len - 1)
        num_rows = self._kv.cover(sequence.request_id, num_wanted) - start
        if following:
            sequence.force(following[:num_rows])
        num_rows = min(num_rows, max_rows)
        if sequence.can_decode:
            draft.decode_chunk(self._kv, sequence, num_rows=num_rows)
        return num_rows if sequence.can_decode else 1

    def _make_room(self, sequence: Sequence) -> bool:
        """Reserve the next token's page, if need be by preempting; False if the sequence must sit this step out."""
        while not self._kv.reserve(sequence.request_id, sequence.num_computed + 1):
            victim = self._running[-1]
            if victim is not sequence:
                self._preempt(victim)
                continue
            if len(self._running) > 1:
                self._preempt(sequence)
            elif not self._launched:  # what is under way may give pages back
                self._end_for_want_of_pages(sequence)
            return False
        return True

    def _plan_prefills(self, draft: Draft, waiting: list[Sequence]) -> None:
        """Chunks of running and waiting sequences."""
        self._kv.begin_pass()
        prefilling = [sequence for sequence in self._running if sequence.is_prefilling]
        if not prefilling and not waiting:
            return
        num_prefilling = len(prefilling) + min(len(waiting), len(self._free_slots))
        budget = self._pace.budget(num_decoding=len(draft.rows), num_prefilling=num_prefilling)
        line, admit = list(heapq.merge(prefilling, waiting, key=_order)), partial(self._admit, draft=draft)
        self._prefills.plan(draft, line, budget=budget, admit=admit)

    def _admit(self, sequence: Sequence, draft: Draft) -> bool:
        """Give a waiting sequence a slot and the pages of all its known tokens and the next, if they are there.

        False if it, and so nobody after it, can be taken now.
        """
        submit, num_known = sequence.submit, len(sequence.token_ids)
        could_fit = partial(self._kv.could_fit, token_ids=sequence.token_ids, salt=sequence.salt)
        if not could_fit(num_known):
            self._end_for_want_of_pages(sequence)
            return True
        num_tokens = min(num_known + 1, sequence.max_len - 1)  # the very last token is never computed
        num_tokens = num_tokens if could_fit(num_tokens) else num_known
        # Who was preempted comes back when the others have room to grow, or it would soon be preempted again.
        headroom = len(self._running) if sequence.was_preempted else 0
        if not self._free_slots:
            return False
        admitted = self._kv.admit(
            submit.request_id,
            sequence.token_ids,
            num_tokens=num_tokens,
            headroom=headroom,
            salt=sequence.salt,
            breakpoints=submit.breakpoints,
            is_pinned=submit.pinned,
            keeps=submit.keeps,
            blocks=submit.prompt.blocks,
        )
        if isinstance(admitted, Admission):
            return admitted is not Admission.NO_ROOM
        sequence.num_computed = admitted.num_cached
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_order)
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.num_to_prefill = num_known
        if sequence.queued_s is None:  # later it may find what it computed itself
            sequence.num_cached = min(admitted.num_cached, sequence.num_prompt)
            sequence.queued_s = self._clock() - sequence.arrived_at
        draft.new.append(sequence.start(num_cached=admitted.num_cached, checkpoint=admitted.checkpoint))
        return True

    # ---- results ----

    @property
    def newest(self) -> Launched | None:
        """The step planned last, if it is not committed."""
        return self._launched[-1] if self._launched else None

    def can_let_in(self) -> bool:
        """Whether some who waited for a prefix may begin behind the step planned last; told but once of each."""
        return bool(self._free_slots) and not self._has_preempted and self._kv.let_on()

    def commit(self, result: StepResult) -> None:
        """Take in the tokens of the oldest step that is not committed. Raises ValueError if they are not its own."""
        launched = self._launched.popleft()
        step = launched.step
        if result.number != step.number or len(result.token_ids) != len(step.sampled_slots):
            raise ValueError(f"step {step.number} has {len(step.sampled_slots)} tokens to come, not {result}")
        self._pace.observe(step, result.elapsed_s)
        launched.remember(self._kv, result)
        self._outputs += launched.prompt_outputs(result)
        tokens = zip(result.token_ids, result.logprobs or itertools.repeat(None), strict=False)
        for row in launched.rows:
            token_id, logprobs = next(tokens) if row.samples else (None, None)
            if row.sequence.is_finished:
                continue
            if row.sequence.slot is not None:
                # Before the token is appended, for that may end the sequence: what it computed is to be remembered.
                known = row.sequence.token_ids
                self._kv.commit(row.sequence.request_id, known, num_computed=row.num_computed)
            if row.sequence.problem:
                self._fail(row.sequence)
            elif token_id is not None:
                self._append(row.sequence, token_id, logprobs)

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """A token is known now, perhaps with others; tell them, and see whether the last was among them."""
        sequence.token_ids.append(token_id)
        sequence.num_pending -= 1
        forced: tuple[int, ...] = ()
        reason = sequence.finish_reason()
        if sequence.forced and reason is None:
            forced, reason = sequence.append_forced()
        self._outputs.append(
            Output(
                sequence.request_id,
                token_ids=(token_id, *forced),
                logprobs=(logprobs,) if sequence.sampling.logprobs is not None else None,
                finish=reason,
                num_cached=0 if sequence.has_output else sequence.num_cached,
                queued_s=None if sequence.has_output else sequence.queued_s,
            )
        )
        sequence.has_output = True
        if reason:
            self._end(sequence)
