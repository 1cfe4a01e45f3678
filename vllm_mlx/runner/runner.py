"""Carries out steps with one of mlx-lm's models: weights, pages, rows, states and the sampler, on one thread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.models.cache import make_prompt_cache

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.family import Family
from vllm_mlx.core.grammar import TokenMasks
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import (
    DecodeRow,
    MemoryUse,
    NewSequence,
    PrefillRow,
    ProgressCallback,
    RunnerInfo,
    Step,
    StepResult,
)
from vllm_mlx.runner import checkpoints, device
from vllm_mlx.runner.checkpoints import Checkpoint, Checkpoints
from vllm_mlx.runner.codec import Exports, decode_checkpoint, page_words
from vllm_mlx.runner.compiled import CompiledSteps
from vllm_mlx.runner.decode_inputs import input_tokens
from vllm_mlx.runner.geometry import BatchPlace, SinglePlace
from vllm_mlx.runner.head import WantedPositions
from vllm_mlx.runner.launched import Launched, Unsampled, sampled_only
from vllm_mlx.runner.layers import PAGE_SIZE, ModelLayers, parts_of
from vllm_mlx.runner.pages import GrowingPages, PageStore
from vllm_mlx.runner.rehearsal import rehearsal
from vllm_mlx.runner.rows import (
    BatchRowView,
    Residents,
    RowBatch,
    SingleRowView,
    StateBatch,
    arrays_of,
    batch_layers,
    fresh_singles,
)
from vllm_mlx.runner.sampler import Sampled, SampledRow, Sampler
from vllm_mlx.runner.scoring import PromptScorer
from vllm_mlx.runner.staging import Staging

log = get_logger("runner")


class MlxRunner:
    """A `Runner` over one loaded model. Every method belongs to the thread that built it."""

    def __init__(
        self,
        model: nn.Module,
        layers: ModelLayers,
        *,
        info: RunnerInfo,
        family: Family,
        pages: PageStore,
        wanted: WantedPositions,
        compiled: CompiledSteps | None = None,
        max_rows: int,
        staging: Staging | None = None,
    ) -> None:
        self._info = info
        self._model = model
        self._layers = layers
        self._family = family
        self._pages = pages
        self._compiled, self._staging = compiled or CompiledSteps(), staging or Staging()
        send = staging.send if staging is not None else mx.array
        self._sampler = Sampler(layers.vocab_size, compiles=info.backend != "cpu", send=send)
        self._scorer = PromptScorer(wanted)
        self._last_tokens = mx.zeros((max_rows + 1,), mx.int32)
        self._own: dict[int, list[Any]] = {}
        self._checkpoints = Checkpoints()
        self._residents = Residents(batch_layers(model, layers))
        self._is_batched = not any(shape.spec.layout is Layout.OWN for shape in layers.shapes)
        self._finished_at = 0.0
        self._holds_back = info.backend == "cpu" and staging is None  # what is staged is evaluated with its step
        self._adds_masks = info.backend == "cuda"  # there, booleans are converted in every layer
        self._held_back: Launched | None = None

    @property
    def info(self) -> RunnerInfo:
        """Facts about the loaded model."""
        return self._info

    def build(self, step: Step) -> Launched:
        """Build the step's graph; on a CPU, start the step before first, see `start`."""
        self._start_held_back()
        self._staging.begin()
        exports = self._start_exports(step)
        imported = self._import(step)
        self._pages.copy(step.copies)
        self._take_slots(step)
        self._checkpoints.drop(step.dropped)
        sampled, order, logits = self._decode(step)
        for rows, last in self._prefill(step.prefills):
            if rows[-1].samples:
                order += [SampledRow(row.slot, row.start + len(row.token_ids)) for row in rows]
                logits.append(last)
        unsampled = [Unsampled(logits, order[-sum(part.shape[0] for part in logits) :])] if logits else []
        if not step.constrained:
            sampled += [self._sample(rows) for rows in unsampled]
            unsampled.clear()
        kept, scores = [*self._take_checkpoints(step), *imported], self._scorer.taken()
        slots = tuple(row.slot for row in order)
        made = [array for checkpoint in kept for array in checkpoint.arrays()]
        made += [array for score in scores.values() for array in score.arrays()]
        written = [*made, *self._written(step), *logits]
        if sampled and (not self._holds_back or not step.decodes):
            # Only a decode reads them: without it, step after step would pile up on graphs that nobody evaluates.
            written.append(self._last_tokens)
        marker = written[-1].reshape(-1)[:1] + 0 if step.num_tokens and not order else None
        sizes = tuple(checkpoint.nbytes for checkpoint in kept)
        return Launched(step, sampled, unsampled, slots, written, marker, sizes, exports, scores)

    def start(self, handle: Launched) -> None:
        """Start a step that was built; on a CPU, hold it back until the next one is built, or its tokens are wanted.

        On a CPU a start blocks until all but the last few operations are done. Started here, a step would make the
        tokens of the one before wait for it. Started with the next one, and without the sampler's many small
        operations, its last and largest one, the output projection, runs while the next step is built.
        """
        handle.launched_at = time.monotonic()
        self._held_back = handle
        if not self._holds_back:
            self._start_held_back()

    def launch(self, step: Step) -> Launched:
        """Build a step and start it."""
        built = self.build(step)
        self.start(built)
        return built

    def sample(self, handle: Launched, masks: Callable[[], TokenMasks]) -> None:
        """Choose the tokens of a step with constrained slots, and start that; see `Runner`.

        The step is started first, so that on a CPU, too, it runs while the masks are worked out.
        """
        if handle is self._held_back:
            self._start_held_back()
        found = masks()
        sampled = [self._sample(rows, found) for rows in handle.unsampled]
        handle.unsampled.clear()
        handle.sampled.extend(sampled)
        if not self._holds_back or not handle.step.decodes:
            mx.async_eval(self._last_tokens, *(one.tokens for one in sampled))  # type: ignore[no-untyped-call]

    def collect(self, handle: Launched) -> StepResult:
        """Wait for the step and return its numbers, in the step's own order."""
        if handle is self._held_back:
            self._start_held_back()
        tokens, logprobs = handle.chosen()
        return self._result(handle, tokens, logprobs)

    def memory(self) -> MemoryUse:
        """Bytes in use now."""
        use = device.memory_use(weights=self._info.memory.weights, pages=self._pages.nbytes)
        single = [caches for group in (self._residents.singles, self._own) for caches in group.values()]
        rows = [*arrays_of(itertools.chain(*single)), *self._residents.arrays()]
        return msgspec.structs.replace(
            use, rows=sum(array.nbytes for array in rows), checkpoints=self._checkpoints.nbytes
        )

    def warm(self, progress: ProgressCallback) -> None:
        """On a GPU, compile what the first requests will need; the rest is compiled in idle time."""
        if self._info.backend == "cpu" and self._compiled.decode is None:
            return
        total = self._compiled.num_urgent
        for i in range(total):
            progress(f"compiling ({i + 1} of {total})", i / total)
            if not self._compiled.warm_one(self._last_tokens):
                break
        progress("trying the model")
        for temperature in (0.0, 1.0):
            for step in rehearsal(self._info, SamplingParams(temperature=temperature, seed=0)):
                self.collect(self.launch(step))
        self._sampler.warm(getattr(mx, self._info.dtype, mx.float32))

    def idle(self) -> bool:
        """Compile one more shape; when all are, give freed memory back to the system."""
        if self._compiled.warm_one(self._last_tokens):
            return True
        device.give_back()
        return False

    def close(self) -> None:
        """Drop the model and all state."""
        self._held_back = None
        self._last_tokens = mx.zeros((1,), mx.int32)  # the old ones may depend on a step that was never computed
        self._sampler = Sampler(self._layers.vocab_size, compiles=self._info.backend != "cpu")
        self._own.clear()
        self._checkpoints, self._staging = Checkpoints(), Staging()
        self._residents = Residents([])
        self._compiled.close()
        self._pages = GrowingPages((), num_pages=0, max_pages=0)
        self._model = nn.Module()
        mx.clear_cache()

    def _start_held_back(self) -> None:
        launched, self._held_back = self._held_back, None
        if launched is not None:
            mx.async_eval(launched.marker, *launched.written)  # type: ignore[no-untyped-call]
            launched.written.clear()  # a reference held on to would make the next write copy the array

    def _result(self, handle: Launched, tokens: dict[int, int], logprobs: dict[int, Any]) -> StepResult:
        now = time.monotonic()
        elapsed_s = now - max(handle.launched_at, self._finished_at)
        self._finished_at = now
        self._staging.done()
        slots = handle.step.sampled_slots
        return StepResult(
            handle.step.number,
            tuple(tokens[slot] for slot in slots),
            tuple(logprobs.get(slot) for slot in slots) if logprobs else None,
            prompt_logprobs=handle.prompt_logprobs(),
            exported=handle.exports.payloads(),
            checkpoint_bytes=handle.checkpoint_bytes,
            elapsed_s=elapsed_s,
        )

    def _start_exports(self, step: Step) -> Exports:
        """Read what the step gives out, before it changes anything."""
        pages = self._pages.export_pages(step.exports) if step.exports else None
        return Exports(pages, tuple(self._checkpoints[number] for number in step.checkpoint_exports))

    def _import(self, step: Step) -> list[Checkpoint]:
        """Take in pages and checkpoints; returns the checkpoints.

        Raises:
            ValueError: bytes that are of no page or checkpoint of this model.
        """
        decoded = [(number, decode_checkpoint(payload)) for number, payload in step.checkpoint_imports]
        for _, checkpoint in decoded:
            checkpoints.restore(checkpoint, parts_of(self._fresh_caches()), num_tokens=0)
        if step.imports:
            page_ids, payloads = zip(*step.imports, strict=True)
            self._pages.import_pages(page_ids, page_words(payloads, page_bytes=self._info.cache.page_bytes))
        for number, checkpoint in decoded:
            self._checkpoints.keep(number, checkpoint)
        return [checkpoint for _, checkpoint in decoded]

    def _take_slots(self, step: Step) -> None:
        for slot in step.released:
            self._sampler.remove(slot)
            self._scorer.remove(slot)
            self._own.pop(slot, None)
            self._residents.remove(slot)
        for new in step.new:
            self._start(new)

    def _start(self, new: NewSequence) -> None:
        self._sampler.add(new)
        self._scorer.add(new)
        caches = self._fresh_caches()
        if new.checkpoint is not None:
            kept = self._checkpoints[new.checkpoint]
            checkpoints.restore(kept, parts_of(caches), num_tokens=new.num_cached)
        if self._is_batched:
            self._residents.add(new.slot, caches)
        else:
            self._own[new.slot] = caches

    def _fresh_caches(self) -> list[Any]:
        """Empty caches of one sequence: of the layers outside pages, or the model's own."""
        return fresh_singles(self._model, self._layers) if self._is_batched else make_prompt_cache(self._model)

    def _take_checkpoints(self, step: Step) -> list[Checkpoint]:
        """Keep what the step asks for, as it is now; only slots with a row in the step have a known length."""
        if not step.checkpoints:
            return []
        num_tokens = {row.slot: row.position + 1 for row in step.decodes}
        num_tokens |= {row.slot: row.start + len(row.token_ids) for row in step.prefills}
        return [self._take_checkpoint(slot, number, num_tokens[slot]) for slot, number in step.checkpoints]

    def _take_checkpoint(self, slot: int, number: int, num_tokens: int) -> Checkpoint:
        if self._is_batched:
            caches, row = self._residents.holders(slot)
            checkpoint = checkpoints.take(caches, row, num_tokens=num_tokens)
        else:
            checkpoint = checkpoints.take_whole(parts_of(self._own[slot]))
        self._checkpoints.keep(number, checkpoint)
        return checkpoint

    def _prefill(self, rows: Sequence[PrefillRow]) -> Iterator[tuple[tuple[PrefillRow, ...], mx.array]]:
        """Chunks, together where that can be, with the logits [rows, vocab] behind them."""
        done: set[int] = set()
        if self._compiled.prefill is not None:
            for group, logits in self._compiled.prefill.logits([row for row in rows if not self._scorer.wants(row)]):
                done.update(row.slot for row in group)
                yield group, logits
        for row in rows:
            if row.slot not in done:
                with self._scorer.positions(row):
                    logits = self._single(row.slot, mx.array([row.token_ids]), row.start, row.tables)
                self._scorer.take(row, logits[0])
                yield (row,), logits[:, -1]

    def _decode(self, step: Step) -> tuple[list[Sampled], list[SampledRow], list[mx.array]]:
        """Tokens of the decoding rows, or what they must still be sampled from, and the order of the rows."""
        rows = step.decodes
        if not rows:
            return [], [], []
        for row in rows:
            if row.token_id is not None:
                self._sampler.append(row.slot, row.token_id)
        order = [SampledRow(row.slot, row.position + 1) for row in rows if row.samples]
        if (function := self._compiled.decode) is not None:
            is_plain = not step.constrained and all(row.samples and row.token_id is None for row in rows)
            compiled = self._sampler.compiled(order, num_rows=function.size(len(rows))) if is_plain else None
            if compiled is None:
                return [], order, sampled_only(function.logits(rows, self._last_tokens), rows)
            drawing, draws = compiled
            tokens, self._last_tokens = function.tokens(rows, self._last_tokens, drawing=drawing, draws=draws)
            return [Sampled(tokens, num_rows=len(rows))], order, []
        ordered, logits = self._decode_eagerly(rows)
        order = [SampledRow(row.slot, row.position + 1) for row in ordered if row.samples]
        return [], order, sampled_only(logits, ordered)

    def _decode_eagerly(self, rows: Sequence[DecodeRow]) -> tuple[list[DecodeRow], mx.array]:
        """Logits [rows, vocab] of the next token of every row, and the rows in the order of the logits."""
        if not self._is_batched:
            last = [self._last_tokens[row.slot].reshape(1, 1) for row in rows]
            each = [self._single(row.slot, t, row.position, row.tables) for row, t in zip(rows, last, strict=True)]
            return list(rows), mx.concatenate(each)[:, -1]
        ordered = list(rows)
        if self._residents.layers:
            by_slot = {row.slot: row for row in rows}
            ordered = [by_slot[slot] for slot in self._residents.gather([row.slot for row in rows])]
        # Who wrote what is before a row saw to its pages.
        written = (table[row.position // PAGE_SIZE] for row in rows for table in row.tables if table)
        self._pages.ensure(max(written, default=0))
        tokens = input_tokens(ordered, self._last_tokens)
        logits: mx.array = self._model(tokens[:, None], cache=self._batch_views(ordered))
        return ordered, logits[:, -1]

    def _single(self, slot: int, token_ids: mx.array, start: int, tables: tuple[tuple[int, ...], ...]) -> mx.array:
        """Logits [1, positions, vocab] of token ids [1, tokens] of one sequence, whose cache holds `start` tokens.

        Positions are those that are wanted; the last one is the last token's.
        """
        if self._is_batched:
            self._pages.ensure(max(itertools.chain(*tables), default=0))
            place = SinglePlace(start, token_ids.shape[1], tables, adds_masks=self._adds_masks)
            cache = self._single_views(slot, place)
        else:
            cache = self._own[slot]
        logits: mx.array = self._model(token_ids, cache=cache)
        return logits

    def _single_views(self, slot: int, place: SinglePlace) -> list[Any]:
        pages, singles = iter(self._pages.single_views(place)), iter(self._residents.singles[slot])
        views: list[Any] = []
        for shape in self._layers.shapes:
            if shape.spec.layout is Layout.PAGES:
                views.append(next(pages))
            elif shape.spec.layout is Layout.ROWS:
                views.append(SingleRowView(next(singles), place, shape.spec.window))
            else:
                views.append(next(singles))
        return self._layers.fold(views)

    def _batch_views(self, rows: Sequence[DecodeRow]) -> list[Any]:
        place = BatchPlace(rows)
        pages, batch = iter(self._pages.batch_views(rows, place)), iter(self._residents.layers)
        views: list[Any] = []
        for shape in self._layers.shapes:
            if shape.spec.layout is Layout.PAGES:
                views.append(next(pages))
                continue
            layer = next(batch)
            if isinstance(layer, RowBatch):
                views.append(BatchRowView(layer, place, shape.spec.window, scores_rank=self._family.scores_rank))
            elif isinstance(layer, StateBatch):
                views.append(layer.cache)
        return self._layers.fold(views)

    def _sample(self, rows: Unsampled, masks: TokenMasks | None = None) -> Sampled:
        """Tokens of all rows, in order."""
        logits = rows.logits[0] if len(rows.logits) == 1 else mx.concatenate(rows.logits)
        sampled, self._last_tokens = self._sampler.sample(logits, rows.order, self._last_tokens, masks=masks)
        return sampled

    def _written(self, step: Step) -> list[mx.array]:
        """Pages, rows and states of the step's sequences."""
        singles = [self._residents.singles.get(row.slot, ()) for row in step.prefills]
        slots = (*(row.slot for row in step.prefills), *(row.slot for row in step.decodes))
        own = [self._own.get(slot, ()) for slot in slots]
        return [*self._pages.written(), *self._residents.arrays(), *arrays_of(itertools.chain(*singles, *own))]
