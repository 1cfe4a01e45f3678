"""The border between the scheduler, which decides, and the runner, which computes.

A `Step` carries counts, token ids and page ids; never text, never arrays. The scheduler builds it from counts alone,
so step N+1 can be launched before the tokens of step N are known: a decode row names no token that was sampled, the
runner keeps the last one of every slot on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from vllm_mlx.core.cachespec import CacheSpec
from vllm_mlx.core.grammar import TokenMasks
from vllm_mlx.core.sampling import SamplingParams


class NewSequence(msgspec.Struct, frozen=True):
    """A sequence takes a slot. `token_ids` are the prompt plus, after preemption or restart, what was generated."""

    slot: int
    sampling: SamplingParams
    """With `seed` resolved to an integer and `stop_token_ids` complete (end-of-sequence included)."""
    token_ids: tuple[int, ...]
    num_prompt: int
    """How many of `token_ids` are the prompt."""
    num_cached: int = 0
    """Tokens that it starts with: in pages that it shares, and in the checkpoint."""
    checkpoint: int | None = None
    """What its layers outside pages start from; None starts them empty. Rows in it may hold more than `num_cached`."""


class PrefillRow(msgspec.Struct, frozen=True):
    """Compute a chunk of known tokens of one sequence, alone and unpadded."""

    slot: int
    start: int
    """Position of the chunk's first token; the cache holds exactly this many tokens of the sequence."""
    token_ids: tuple[int, ...]
    page_ids: tuple[int, ...]
    """The sequence's page table, of the first group of layers; covers at least start + len(token_ids) tokens. Where all
    layers of the group have a window, entries of pages that no token from `start` on looks at may be 0."""
    samples: bool
    """Whether the chunk ends the known tokens, so that a next token is sampled from its last logits."""
    other_page_ids: tuple[tuple[int, ...], ...] = ()
    """The page tables of the other groups (`CacheSpec.windows`), in order; as `page_ids`."""

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """The page tables of all groups."""
        return (self.page_ids, *self.other_page_ids)


class DecodeRow(msgspec.Struct, frozen=True, gc=False):
    """Compute one token of a sequence and, unless told otherwise, sample the next one.

    Where `RunnerInfo.chunked_decode` says so, a slot may have several rows in a step, at positions that follow each
    other: its last sampled token, and tokens that are known to come behind it. Every layer stores the keys and values
    of all rows before any row attends, and a row looks at no position behind its own: together they compute what a
    chunk would.
    """

    slot: int
    position: int
    """Position of the token; the cache, and the slot's rows before this one, hold exactly this many of the sequence."""
    page_ids: tuple[int, ...]
    """The sequence's page table; covers at least position + 1 tokens. From step to step it is the same tuple, not only
    an equal one, until it changes: a runner that has converted it may ask `is` instead of comparing. It changes when
    pages are added, and where all layers of the group have a window, when they are left behind: entries of pages that
    no token from `position` on looks at may be 0."""
    other_page_ids: tuple[tuple[int, ...], ...] = ()
    """The page tables of the other groups (`CacheSpec.windows`), in order; as `page_ids`."""
    token_id: int | None = None
    """The token, where it was not sampled; None for the slot's last sampled one, which only the runner may know yet.
    From this row on it counts as output of the sequence, for penalties as for all else."""
    samples: bool = True
    """Whether a next token is sampled; never where another row of the slot follows."""

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """The page tables of all groups."""
        return (self.page_ids, *self.other_page_ids)


class Step(msgspec.Struct, frozen=True):
    """Orders for one forward pass, carried out in the order of the fields.

    A *checkpoint* is a copy of what a sequence has outside pages, rows and recurrent states. The scheduler numbers it.
    """

    number: int
    released: tuple[int, ...] = ()
    """Slots whose sequence ended or was preempted; their state may be dropped."""
    exports: tuple[int, ...] = ()
    """Pages whose bytes are wanted, as they are before this step; see `StepResult.exported`."""
    checkpoint_exports: tuple[int, ...] = ()
    """Checkpoints whose bytes are wanted."""
    imports: tuple[tuple[int, bytes], ...] = ()
    """(page id, bytes that were exported from a page of the same model)."""
    checkpoint_imports: tuple[tuple[int, bytes], ...] = ()
    """(number of a new checkpoint, bytes that were exported from one of the same model)."""
    copies: tuple[tuple[int, int], ...] = ()
    """(source, target) page ids; all sources are read before any target is written."""
    new: tuple[NewSequence, ...] = ()
    dropped: tuple[int, ...] = ()
    """Checkpoints that are of no more use; a sequence that starts in this step may still start from one."""
    prefills: tuple[PrefillRow, ...] = ()
    decodes: tuple[DecodeRow, ...] = ()
    checkpoints: tuple[tuple[int, int], ...] = ()
    """(slot, number of a new checkpoint), taken once the rows above are computed."""
    constrained: tuple[int, ...] = ()
    """Sampled slots whose tokens must be ones that a grammar allows. Which these are is told by `Runner.sample`."""

    @property
    def sampled_slots(self) -> tuple[int, ...]:
        """Slots that get a token, in the order of `StepResult.token_ids`: decodes first, then prefills."""
        return tuple(r.slot for r in self.decodes if r.samples) + tuple(r.slot for r in self.prefills if r.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return len(self.decodes) + sum(len(r.token_ids) for r in self.prefills)


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Natural-log probabilities of the model itself: before penalties, bias, temperature and filters."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    """Of `top_ids`, most likely first."""


class PromptLogprobs(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Of consecutive tokens of a prompt, each given those before it."""

    start: int
    """Position of the first of them, at least 1: nothing comes before the token at 0."""
    logprobs: tuple[TokenLogprobs, ...]
    ranks: tuple[int, ...]
    """How many tokens were at least as likely, itself included; 1 for the most likely one."""


class Staged(Protocol):
    """Bytes of a page or checkpoint on their way out, which may lie where the runner computed them until they are
    taken. They do not change, whatever becomes of the page or checkpoint.
    """

    @property
    def nbytes(self) -> int:
        """How many."""
        ...

    def take(self) -> memoryview:
        """The bytes, copied to plain memory that nobody else has. May be called on any thread; others run meanwhile."""
        ...


class StepResult(msgspec.Struct, frozen=True):
    """Plain numbers back: one token per sampled slot, in the order of `Step.sampled_slots`."""

    number: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """None when no row of the step asked for them."""
    prompt_logprobs: tuple[PromptLogprobs | None, ...] | None = None
    """Of `Step.prefills`, in order: a chunk gives those of the tokens that follow its tokens within the prompt. None
    when no chunk of the step was to give any."""
    exported: tuple[Staged, ...] = ()
    """Of `Step.exports`, in order; then of `Step.checkpoint_exports`. Whoever takes their bytes drops them soon after,
    for they hold memory of the device."""
    checkpoint_bytes: tuple[int, ...] = ()
    """Sizes of `Step.checkpoints`, then of `Step.checkpoint_imports`, in order."""
    elapsed_s: float = 0.0
    """From the end of the step before (or the launch, if later) to the end of this one: what the step cost."""


class MemoryUse(msgspec.Struct, frozen=True):
    """Bytes on the device."""

    active: int = 0
    cache: int = 0
    peak: int = 0
    weights: int = 0
    pages: int = 0
    rows: int = 0
    """Caches and states of running sequences that are not in pages."""
    checkpoints: int = 0
    """Remembered states that cannot be cut."""
    staging: int = 0
    """On their way to or from the disk."""


class KernelStatus(msgspec.Struct, frozen=True):
    """How one of the GPU's kernels fared when it was tried before its first use."""

    name: str
    problem: str | None = None
    """Why it is not used; None if it is."""
    error: float = 0.0
    """Relative difference, in norm, from plain operations."""


class RunnerInfo(msgspec.Struct, frozen=True):
    """What a runner tells the engine once its model is loaded."""

    vocab_size: int
    """Width of the logits; token ids are below it."""
    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""
    num_pages: int
    """Usable pages are 1 .. num_pages - 1, each of one group of layers at a time; page 0 is scratch for padded rows. 0
    if no layer is paged."""
    cache: CacheSpec
    backend: str
    """'metal', 'cuda', 'cpu' or 'fake'."""
    device: str
    dtype: str
    batched_decode: bool = True
    """False if sequences must be decoded one at a time (the runner does so itself)."""
    chunked_decode: bool = False
    """Whether a slot may have several decode rows in a step: only if all that is kept of sequences is in pages."""
    notes: tuple[str, ...] = ()
    """Lines worth showing at start-up, such as the BLAS in use."""
    fingerprint: bytes = b""
    """16 bytes that stand for the model and for how its state is kept: no other's may be used. Empty: unknown."""
    checkpoint_bytes: int = 0
    """Room for checkpoints; 0 if all layers are in pages."""
    kernels: tuple[KernelStatus, ...] = ()
    """The kernels that this model needs on this GPU; none on a CPU."""
    memory: MemoryUse = MemoryUse()
    min_chunk: int = 32
    """Tokens of a prompt chunk below which its cost is that of the step, not of the tokens."""


class Runner(Protocol):
    """Computes steps. Created, called and closed on the engine's thread only.

    State of a slot starts with `Step.new`, ends with `Step.released`. Steps are carried out in the order launched;
    a launched step may still be running when the next is launched.
    """

    @property
    def info(self) -> RunnerInfo:
        """Facts about the loaded model."""
        ...

    def build(self, step: Step) -> Any:
        """Get a step ready to be started, as far as the host can; returns its handle, never None.

        It needs no token of the step before, which may be running: its numbers may be collected before this one is
        started. Every step is started, before the next is built.
        """
        ...

    def start(self, handle: Any) -> None:
        """Have the step that was built last computed, without waiting for it; other threads may run meanwhile.

        A step with constrained slots is computed up to its logits: `sample` must follow before the next is built.
        """
        ...

    def launch(self, step: Step) -> Any:
        """Build and start a step; returns its handle."""
        ...

    def sample(self, handle: Any, masks: Callable[[], TokenMasks]) -> None:
        """Choose the tokens of a step that has constrained slots; does not wait for them.

        Called once, for the step started last. `masks` waits for the masks: it is called when there is nothing else
        to do for this step.
        """
        ...

    def collect(self, handle: Any) -> StepResult:
        """Wait for a launched step and return its numbers. Handles are collected in launch order."""
        ...

    def memory(self) -> MemoryUse:
        """Bytes in use now."""
        ...

    def idle(self) -> bool:
        """Called when there is nothing to do: drop temporary memory, or do a short piece of work that can wait.

        True if there is more such work: then it is called again, unless a message came.
        """
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class RunnerFactory(Protocol):
    """Loads a model on the calling thread; `progress(text, fraction)` may be called while it does."""

    def __call__(self, progress: ProgressCallback) -> Runner:
        """Raises ModelError if the model cannot be loaded."""
        ...


class ProgressCallback(Protocol):
    """Receives what is going on (`text`) and how far it is (`fraction` 0..1, None if unknown)."""

    def __call__(self, text: str, fraction: float | None = None) -> None: ...
