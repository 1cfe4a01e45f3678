"""What the API side and an engine say to each other, in a process or across one (msgpack), and who says it.

Every message is a frozen struct of plain numbers, strings and bytes. `EngineClient` is all that the API side knows.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from enum import StrEnum
from typing import Protocol

import msgspec

from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import MemoryUse, PromptLogprobs, RunnerInfo, TokenLogprobs


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """An end-of-sequence or stop token was chosen (or, outside the engine, a stop string was seen)."""
    LENGTH = "length"
    """max_tokens or the context was reached."""
    ABORT = "abort"
    """Nobody waits for it any more."""
    ERROR = "error"
    """It failed; see the message."""
    REJECTED = "rejected"
    """The waiting queue was full; nothing was computed."""


# ---- to the engine ----


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a sequence. `sampling` has its seed and max_tokens set; `stop_token_ids` includes end-of-sequence."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    priority: int = 0
    """Higher goes first and is preempted last."""
    resume_token_ids: tuple[int, ...] = ()
    """Tokens that an earlier engine already generated for it; they count as output and are not sent again."""
    pinned: bool = False
    """Keep what is remembered of its prompt, whatever else needs the memory."""
    breakpoints: tuple[int, ...] = ()
    """Lengths of the prompt's beginnings that other prompts are likely to share, rising: where a state that cannot be
    cut is worth keeping."""
    keeps: tuple[tuple[int, int], ...] = ()
    """Beginnings of the prompt that are given up last when memory is needed: length in tokens, and for how many
    seconds."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget a sequence. Unknown ids are ignored."""

    request_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Stop at once and free everything."""


class CacheLookup(msgspec.Struct, frozen=True, tag=True):
    """Ask what is remembered of a prompt; answered with `CacheLookedUp`. Nothing is computed or changed."""

    query_id: str
    prompt: Prompt


class CacheForget(msgspec.Struct, frozen=True, tag=True):
    """Drop all remembered prefixes, in memory and on disk; answered with `CacheForgotten`."""

    query_id: str


ToEngine = Submit | Abort | Shutdown | CacheLookup | CacheForget


# ---- from the engine ----


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Loading goes on."""

    text: str
    fraction: float | None = None


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; requests are taken from now on."""

    info: RunnerInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine ends, and why. `is_model_error`: a restart would fail the same way."""

    reason: str
    is_model_error: bool = False


class Output(msgspec.Struct, frozen=True, gc=False, tag=True):
    """New tokens of one sequence; the last one carries `finish`. A stop token is included in `token_ids`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: FinishReason | None = None
    message: str | None = None
    """With FinishReason.ERROR or REJECTED: what went wrong, for the caller."""
    num_cached: int = 0
    """Prompt tokens that were not computed because their pages were shared."""
    prompt_logprobs: PromptLogprobs | None = None
    """Of some of the prompt's tokens; all of them come before the first token. After a restart of the engine they may
    come again."""
    queued_s: float | None = None
    """With the first tokens: how long the sequence waited before its first chunk was computed."""


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """All that one step gave."""

    outputs: tuple[Output, ...]


class DiskStats(msgspec.Struct, frozen=True):
    """Figures of the cache on disk; counts are since the engine started."""

    num_blobs: int
    """Pages and checkpoints that this model may load."""
    size_bytes: int
    """Of those."""
    queued_bytes: int
    """Memory of what waits to be written."""
    ahead_bytes: int
    """Memory of what was read and not taken yet."""
    num_saved: int
    bytes_written: int
    num_hits: int
    """Blobs loaded."""
    bytes_read: int
    num_misses: int
    """Blobs that were asked for and could not be loaded."""
    num_corrupt: int
    """Files that were not what had been written."""
    num_evicted: int
    """Files deleted to make room."""
    num_refused: dict[str, int]
    """Blobs that were not written, by reason."""
    problem: str | None = None
    """Why nothing is written now."""


class Stats(msgspec.Struct, frozen=True, tag=True):
    """The engine's state, sent a few times a second while busy and when it becomes idle; also its heartbeat."""

    num_running: int = 0
    num_waiting: int = 0
    pages_used: int = 0
    pages_free: int = 0
    """Pages that can be handed out, those of remembered prefixes included."""
    pages_kept: int = 0
    """Pages of remembered prefixes that nobody uses."""
    pages_pinned: int = 0
    """Pages of pinned prefixes, used or not; they are never given to others."""
    num_checkpoints: int = 0
    """Remembered states of layers that cannot be cut."""
    num_loading: int = 0
    """Waiting sequences whose prefix is being loaded from the disk."""
    disk: DiskStats | None = None
    """Figures of the cache on disk, if there is one."""
    num_evicted_pages: int = 0
    """Pages of remembered prefixes that were given to others, since this engine started; so are the next three."""
    num_preemptions: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    """Tokens computed, prompt and output."""
    memory: MemoryUse = MemoryUse()
    busy: bool = False
    """Whether a step is being computed now."""


class CacheMatch(msgspec.Struct, frozen=True):
    """What a prompt would find if it were submitted now."""

    num_tokens: int
    """Tokens of the prompt."""
    num_memory: int
    """Of them, from the first on, those that are remembered in memory."""
    num_stored: int
    """Those that follow on disk."""
    page_size: int
    """Tokens are remembered in pages of so many."""

    @property
    def num_found(self) -> int:
        """Tokens that would not be computed."""
        return self.num_memory + self.num_stored


class CacheLookedUp(msgspec.Struct, frozen=True, tag=True):
    """Answer to the `CacheLookup` of that id."""

    query_id: str
    match: CacheMatch


class CacheFreed(msgspec.Struct, frozen=True):
    """What forgetting freed."""

    num_pages: int
    """Pages in memory; those of running sequences are forgotten too, but freed when these end."""
    num_checkpoints: int = 0
    num_stored: int = 0
    """Files on disk."""


class CacheForgotten(msgspec.Struct, frozen=True, tag=True):
    """Answer to the `CacheForget` of that id."""

    query_id: str
    freed: CacheFreed


FromEngine = Progress | Ready | Failed | Outputs | Stats | CacheLookedUp | CacheForgotten


# ---- the engine as the API side sees it ----


class EngineState(StrEnum):
    """What `/health` reports."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class EngineStatus(msgspec.Struct, frozen=True):
    """One look at an engine."""

    state: EngineState
    info: RunnerInfo | None = None
    stats: Stats = Stats()
    num_restarts: int = 0
    reason: str | None = None
    """Why it is restarting or failed."""


class EngineClient(Protocol):
    """An engine, whichever process it runs in. All methods are called on one event loop."""

    async def start(self) -> RunnerInfo:
        """Load the model and wait until requests are taken.

        Raises:
            ModelError: the model cannot be loaded.
            EngineStartError: the engine ended or fell silent.
        """
        ...

    def generate(self, submit: Submit) -> AsyncGenerator[Output, None]:
        """Run one sequence; the iterator ends after the output that carries `finish`.

        Closing the iterator early aborts the sequence. An engine that dies and comes back goes on with the tokens it
        had: the caller sees neither a gap nor a repetition. The finish reasons seen are STOP, LENGTH, ERROR and
        REJECTED.
        """
        ...

    async def lookup(self, prompt: Prompt) -> CacheMatch:
        """What is remembered of a prompt. Raises EngineFailure if no engine is ready or it ends before it answers."""
        ...

    async def forget_cache(self) -> CacheFreed:
        """Drop all remembered prefixes. Raises EngineFailure like `lookup`."""
        ...

    def status(self) -> EngineStatus:
        """A look without waiting."""
        ...

    async def wait_failed(self) -> str:
        """Wait until the engine is given up, and return the reason. Never returns for a healthy engine."""
        ...

    async def stop(self) -> None:
        """End the engine. Open sequences finish with ERROR. May be called twice."""
        ...
