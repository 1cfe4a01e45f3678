"""A runner without a model: scripted tokens, real page tables, and a strict reading of the contract in `core.step`."""

from __future__ import annotations

import itertools
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import msgspec

from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout
from vllm_mlx.core.grammar import TokenMasks
from vllm_mlx.core.step import (
    DecodeRow,
    MemoryUse,
    NewSequence,
    PrefillRow,
    ProgressCallback,
    RunnerInfo,
    Step,
    StepResult,
    TokenLogprobs,
)
from vllm_mlx.testing.choosing import allowed_tokens, fallback_token, halving, next_allowed
from vllm_mlx.testing.contract import ContractError, expect
from vllm_mlx.testing.held import Handle, Slot, StagedBytes
from vllm_mlx.testing.pages import FakePages
from vllm_mlx.testing.scoring import prompt_logprobs

__all__ = ["ContractError", "FakeFactory", "FakeRunner", "expect", "fake_factory"]

Script = Callable[[tuple[int, ...]], int]
"""All tokens of a sequence so far, prompt included -> the next token."""

TOKEN_BYTES = 4


class FakeRunner:
    """Satisfies `core.step.Runner`, and raises ContractError where a real runner would compute nonsense.

    Pages are modelled: (page id, offset) holds a token, and the next token is chosen from what is read back through
    the row's page table, so a wrong table gives wrong tokens. `windows` are those of the groups of layers: what is in
    the pages of a window is compared with what must be there. Without a script the next token is a pure function of the
    tokens so far (and of the seed, unless greedy). `num_pages=0` keeps a row per slot instead of pages. `step_s` is
    how long a step takes; steps are computed one after another, as on a device. `chunked_decode`: see `RunnerInfo`; it
    needs a model that is all in pages.
    """

    def __init__(
        self,
        *,
        script: Script | None = None,
        vocab_size: int = 32_000,
        max_model_len: int = 4096,
        num_pages: int = 1024,
        page_size: int = 32,
        windows: tuple[int | None, ...] = (None,),
        state: Layout | None = None,
        checkpoint_bytes: int = 1 << 20,
        fingerprint: bytes = b"",
        step_s: float = 0.0,
        min_chunk: int = 1,
        chunked_decode: bool = True,
    ) -> None:
        state = state or (None if num_pages else Layout.ROWS)
        layers = tuple(LayerSpec(Layout.PAGES, window) for window in windows) if num_pages else ()
        self._info = RunnerInfo(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_pages=num_pages,
            cache=CacheSpec(
                layers=layers + ((LayerSpec(state),) if state else ()),
                page_size=page_size,
                page_bytes=TOKEN_BYTES * page_size,
                windows=windows,
            ),
            backend="fake",
            device="none",
            dtype="none",
            fingerprint=fingerprint,
            checkpoint_bytes=checkpoint_bytes if state else 0,
            min_chunk=min_chunk,
            chunked_decode=chunked_decode and num_pages > 0 and state is None,
        )
        self._state = state
        self._checkpoints: dict[int, list[int]] = {}
        self._script = script
        self._step_s = step_s
        self._slots: dict[int, Slot] = {}
        self._pages = FakePages(self._info.cache.page_groups, num_pages=num_pages)
        self._launched: deque[Handle] = deque()
        self._last_number = -1
        self._ready_at = 0.0
        self._is_closed = False
        self.num_idle_calls = 0

    @property
    def info(self) -> RunnerInfo:
        """Facts about the imaginary model."""
        return self._info

    @property
    def live_slots(self) -> tuple[int, ...]:
        """Slots that hold a sequence now."""
        return tuple(sorted(self._slots))

    def build(self, step: Step) -> Any:
        """Take a step. Raises ContractError if it breaks a promise."""
        expect(not self._is_closed, "a step after close()")
        last = self._launched[-1] if self._launched else None
        expect(last is None or last.is_started, "a step is built before the last one was started")
        expect(last is None or last.is_sampled, "a step before the constrained slots of the last one were sampled")
        expect(step.number > self._last_number, f"step {step.number} after step {self._last_number}")
        self._last_number = step.number
        self._check_rows(step)
        for slot in step.released:
            self._release(slot)
        exported = self._move(step)
        self._pages.copy(step.copies)
        for new in step.new:
            self._take(new)
        for number in step.dropped:
            expect(self._checkpoints.pop(number, None) is not None, f"checkpoint {number} is dropped but not there")
        prefilled = [self._prefill(row) for row in step.prefills]
        decoded = [self._decode(row) for row in step.decodes]
        sampled = [slot for slot in decoded + prefilled if slot is not None]
        vocab_size = self._info.vocab_size
        scores = tuple(prompt_logprobs(row, self._slots[row.slot], vocab_size=vocab_size) for row in step.prefills)
        sizes = [self._keep(slot, number) for slot, number in step.checkpoints]
        sizes += [len(payload) for _, payload in step.checkpoint_imports]
        result = StepResult(
            number=step.number,
            token_ids=(),
            prompt_logprobs=scores if any(scores) else None,
            exported=exported,
            checkpoint_bytes=tuple(sizes),
            elapsed_s=self._step_s,
        )
        handle = Handle(step, result, sampled)
        self._launched.append(handle)
        self._check_constrained(handle)
        if not step.constrained:
            self._choose(handle, {})
        return handle

    def start(self, handle: Any) -> None:
        """Begin to wait for a step. Raises ContractError if it is not the one that was built last."""
        expect(bool(self._launched) and self._launched[-1] is handle, "only the step built last can be started")
        expect(not handle.is_started, "a step is started twice")
        handle.is_started = True
        handle.ready_at = self._ready_at = max(time.monotonic(), self._ready_at) + self._step_s

    def launch(self, step: Step) -> Any:
        """Build and start a step."""
        handle = self.build(step)
        self.start(handle)
        return handle

    def sample(self, handle: Any, masks: Callable[[], TokenMasks]) -> None:
        """Choose the tokens of a step with constrained slots. Raises ContractError if the masks are not theirs."""
        expect(bool(self._launched) and self._launched[-1] is handle, "only the step built last can be sampled")
        expect(handle.is_started, "a step is sampled before it was started")
        expect(not handle.is_sampled, "a step is sampled twice")
        self._choose(handle, allowed_tokens(masks(), handle.step.constrained, vocab_size=self._info.vocab_size))

    def collect(self, handle: Any) -> StepResult:
        """Wait until the step is done. Raises ContractError if an earlier one was not collected."""
        expect(bool(self._launched) and self._launched[0] is handle, "steps are collected in launch order, once each")
        done = self._launched.popleft()
        expect(done.is_started, "a step is collected before it was started")
        expect(done.is_sampled, "a step with constrained slots is collected before it was sampled")
        if self._step_s:
            time.sleep(max(0.0, done.ready_at - time.monotonic()))
        return done.result

    def memory(self) -> MemoryUse:
        """Bytes of the imaginary pages."""
        used = self._info.cache.page_bytes * self._pages.num_used
        return MemoryUse(active=used, pages=self._info.cache.page_bytes * self._info.num_pages)

    def idle(self) -> bool:
        """Counts its calls."""
        self.num_idle_calls += 1
        return False

    def close(self) -> None:
        """Forget everything; no step may follow."""
        self._is_closed = True
        self._slots.clear()
        self._pages.clear()
        self._checkpoints.clear()

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Those that are kept now."""
        return tuple(self._checkpoints)

    # ---- the orders of a step ----

    def _check_rows(self, step: Step) -> None:
        slots = [row.slot for row in step.prefills]
        for number, rows in itertools.groupby(step.decodes, key=attrgetter("slot")):
            slots.append(number)
            for before, row in itertools.pairwise(rows):
                expect(self._info.chunked_decode, f"slot {number}: two rows in one step")
                expect(row.position == before.position + 1, f"slot {number}: two rows that do not follow each other")
                expect(row.token_id is not None, f"slot {number}: a second row without its token")
                expect(not before.samples, f"slot {number}: a row samples a token that another brings")
        expect(len(slots) == len(set(slots)), "a slot has rows in two places of one step")

    def _release(self, number: int) -> None:
        self._pages.drop(self._live(number))
        del self._slots[number]

    def _take(self, new: NewSequence) -> None:
        expect(new.slot not in self._slots, f"slot {new.slot} is taken again without having been released")
        expect(new.slot >= 0, "slots count from 0")
        expect(0 < new.num_prompt <= len(new.token_ids), "num_prompt must be 1 .. len(token_ids)")
        expect(len(new.token_ids) < self._info.max_model_len, "no room for a next token within max_model_len")
        in_range = min(new.token_ids) >= 0 and max(new.token_ids) < self._info.vocab_size
        expect(in_range, "a token id is outside the vocabulary")
        expect(new.sampling.seed is not None, "the seed must be resolved to an integer")
        expect(0 <= new.num_cached < len(new.token_ids), "num_cached must leave a token to compute")
        slot = Slot(new.slot, new.sampling, list(new.token_ids), len(new.token_ids), new.num_prompt)
        if self._state is not None:
            slot.row = self._restored(new)
        slot.num_shared = new.num_cached
        self._slots[new.slot] = slot

    def _restored(self, new: NewSequence) -> list[int]:
        """What a sequence has outside pages at its start."""
        expect((new.checkpoint is None) == (new.num_cached == 0), "a start within the tokens needs a checkpoint")
        if new.checkpoint is None:
            return []
        expect(new.checkpoint in self._checkpoints, f"checkpoint {new.checkpoint} is not there")
        row = self._checkpoints[new.checkpoint]
        is_exact = self._state is Layout.ROWS or len(row) == new.num_cached
        expect(is_exact, f"checkpoint {new.checkpoint} holds {len(row)} tokens and cannot be cut to {new.num_cached}")
        expect(row[: new.num_cached] == list(new.token_ids[: new.num_cached]), "the checkpoint holds other tokens")
        return row[: new.num_cached]

    def _move(self, step: Step) -> tuple[StagedBytes, ...]:
        """Let pages and checkpoints out, then in."""
        exported = self._pages.export(step.exports)
        for number in step.checkpoint_exports:
            expect(number in self._checkpoints, f"checkpoint {number} is exported but not there")
            exported.append(array("i", self._checkpoints[number]).tobytes())
        self._pages.take_in(step.imports)
        for number, payload in step.checkpoint_imports:
            expect(number not in self._checkpoints, f"checkpoint {number} is there already")
            self._checkpoints[number] = array("i", payload).tolist()
        return tuple(map(StagedBytes, exported))

    def _keep(self, number: int, checkpoint: int) -> int:
        """Take a checkpoint; returns its size."""
        slot = self._live(number)
        expect(self._state is not None, "a checkpoint, but all layers are in pages")
        expect(checkpoint not in self._checkpoints, f"checkpoint {checkpoint} is there already")
        self._checkpoints[checkpoint] = list(slot.row)
        return TOKEN_BYTES * len(slot.row)

    def _prefill(self, row: PrefillRow) -> Slot | None:
        """Returns the slot if it gets a token."""
        slot = self._live(row.slot)
        end = row.start + len(row.token_ids)
        known = slot.token_ids[: slot.num_given]
        expect(bool(row.token_ids), f"slot {row.slot}: an empty chunk")
        expect(slot.num_cached < slot.num_given, f"slot {row.slot}: a chunk after the prefill ended")
        expect(row.token_ids == tuple(known[row.start : end]), f"slot {row.slot}: the chunk holds other tokens")
        expect(row.samples == (end == len(known)), f"slot {row.slot}: `samples` says whether the chunk ends the tokens")
        self._pages.use(slot, row.tables, row.start)
        self._expect_cached(slot, row.start)
        self._write(slot, row.start, row.token_ids)
        return slot if row.samples else None

    def _decode(self, row: DecodeRow) -> Slot | None:
        """Returns the slot if it gets a token."""
        slot = self._live(row.slot)
        expect(len(slot.token_ids) > slot.num_given, f"slot {row.slot}: a decode before the prefill ended")
        expect(len(slot.token_ids) < self._info.max_model_len, f"slot {row.slot}: a decode past max_model_len")
        if row.token_id is not None:
            expect(row.position == len(slot.token_ids), f"slot {row.slot}: a known token that does not come next")
            expect(0 <= row.token_id < self._info.vocab_size, f"slot {row.slot}: a token outside the vocabulary")
            slot.token_ids.append(row.token_id)
        self._pages.use(slot, row.tables, row.position)
        self._expect_cached(slot, row.position)
        self._write(slot, row.position, (slot.token_ids[row.position],))
        return slot if row.samples else None

    # ---- the cache ----

    def _live(self, number: int) -> Slot:
        expect(number in self._slots, f"slot {number} holds no sequence")
        return self._slots[number]

    def _expect_cached(self, slot: Slot, num_tokens: int) -> None:
        """The slot's cache holds `num_tokens`: its own, or, before its first chunk, those of pages that it shares."""
        if slot.num_cached == 0 and num_tokens > 0 and (self._info.num_pages or slot.num_shared):
            is_told = self._state is None or num_tokens == slot.num_shared
            expect(is_told, f"slot {slot.number}: starts at {num_tokens}, not {slot.num_shared}")
            found = self._read(slot, num_tokens)
            expect(found == tuple(slot.token_ids[:num_tokens]), f"slot {slot.number}: shared pages hold other tokens")
            slot.num_cached = num_tokens
        held = slot.num_cached
        expect(held == num_tokens, f"slot {slot.number}: the cache holds {held} tokens, the row says {num_tokens}")

    def _write(self, slot: Slot, start: int, token_ids: tuple[int, ...]) -> None:
        slot.num_cached = start + len(token_ids)
        if self._state is not None:
            expect(
                len(slot.row) == start, f"slot {slot.number}: the state is behind {len(slot.row)} tokens, not {start}"
            )
            slot.row.extend(token_ids)
        self._pages.write(slot, start, token_ids)

    def _read(self, slot: Slot, num_tokens: int) -> tuple[int, ...]:
        """The first `num_tokens` tokens, as the cache has them."""
        return self._pages.read(slot, num_tokens) if self._info.num_pages else tuple(slot.row[:num_tokens])

    # ---- the sampler ----

    def _check_constrained(self, handle: Handle) -> None:
        constrained = tuple(slot.number for slot in handle.sampled if slot.sampling.is_constrained)
        expect(handle.step.constrained == constrained, "`constrained` names the sampled slots with masks, in order")

    def _choose(self, handle: Handle, allowed: Mapping[int, bytes]) -> None:
        """The tokens of a step; `allowed` has a byte per token for constrained slots."""
        handle.is_sampled = True
        tokens = tuple(self._sample(slot, allowed.get(slot.number)) for slot in handle.sampled)
        asked = any(slot.sampling.logprobs is not None for slot in handle.sampled)
        logprobs = tuple(self._logprobs(slot) for slot in handle.sampled) if asked else None
        handle.result = msgspec.structs.replace(handle.result, token_ids=tokens, logprobs=logprobs)

    def _sample(self, slot: Slot, allowed: bytes | None) -> int:
        tokens = self._read(slot, slot.num_cached)
        token = self._script(tokens) if self._script else fallback_token(tokens, slot.sampling, self._info.vocab_size)
        expect(0 <= token < self._info.vocab_size, f"the script chose token {token}, outside the vocabulary")
        num_generated = len(slot.token_ids) - slot.num_prompt
        token = next_allowed(
            token, slot.sampling, allowed, num_generated=num_generated, vocab_size=self._info.vocab_size
        )
        slot.token_ids.append(token)
        return token

    def _logprobs(self, slot: Slot) -> TokenLogprobs | None:
        count = slot.sampling.logprobs
        return None if count is None else halving(slot.token_ids[-1], count, vocab_size=self._info.vocab_size)


class FakeFactory:
    """A `RunnerFactory` that can be pickled (if the script can). `runner` is the one that it made last."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self.runner: FakeRunner | None = None

    def __call__(self, progress: ProgressCallback) -> FakeRunner:
        """Make a runner; there is nothing to load."""
        progress("fake model", 1.0)
        self.runner = FakeRunner(**self._options)
        return self.runner


def fake_factory(**options: Any) -> FakeFactory:
    """A factory of `FakeRunner(**options)`."""
    return FakeFactory(options)
