"""Progress of one request inside the engine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from vllm_mlx.core.messages import FinishReason, Submit
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import NewSequence, RunnerInfo
from vllm_mlx.engine.constraints import Constraint
from vllm_mlx.engine.vocabulary import Vocabulary

MAX_SCORED = 256
"""Most tokens of a chunk whose log-probabilities are asked; with 150,000 logits each they are 150 MB."""


def refusal(submit: Submit, info: RunnerInfo, vocabulary: Vocabulary) -> str | None:
    """Why the model can never run this sequence, for the caller; None if it can."""
    num_prompt, limit = len(submit.prompt), info.max_model_len
    if num_prompt == 0:
        return "The prompt is empty; it needs at least one token."
    if num_prompt > limit - 1:
        return f"The prompt has {num_prompt} tokens; at most {limit - 1} fit the context of {limit} with an answer."
    token_id = vocabulary.first_outside(submit.prompt, submit.resume_token_ids)
    return None if token_id is None else f"Token id {token_id} is outside the model's vocabulary of {vocabulary.size}."


def max_len(submit: Submit, info: RunnerInfo) -> int:
    """Most tokens that the sequence can have, prompt and output."""
    max_tokens = submit.sampling.max_tokens
    return info.max_model_len if max_tokens is None else min(info.max_model_len, len(submit.prompt) + max_tokens)


@dataclass(slots=True, eq=False)
class Sequence:
    """Counts and known tokens; touched by the scheduler only.

    There is no phase. `num_computed` says how far the cache will be when every launched step is done, `num_tokens` how
    long the sequence will be then: its known tokens plus a placeholder for every token that is still on its way.
    """

    submit: Submit
    arrival: int
    arrived_at: float
    max_len: int
    """Most tokens it can have, prompt and output."""
    request_id: str = field(init=False)
    """The name that the API side knows it by."""
    sampling: SamplingParams = field(init=False)
    """How its tokens are chosen."""
    salt: bytes = field(init=False)
    """Of the prompt; nobody else's if log-probabilities are asked of it, so that no part of it is remembered."""
    num_prompt: int = field(init=False)
    """Tokens of the prompt."""
    token_ids: list[int] = field(init=False)
    """Known tokens: prompt, then output."""
    slot: int | None = None
    """Its place in the runner while it runs."""
    constraint: Constraint | None = None
    """What limits the tokens of its output, if anything does."""
    num_computed: int = 0
    num_pending: int = 0
    """Tokens that are on their way: sampled by steps that are not committed yet, or forced behind one of those."""
    forced: tuple[int, ...] = ()
    """Tokens that were not sampled, for there was no choice: the latest ones."""
    forced_start: int = 0
    """Position of the first of them."""
    num_to_prefill: int = 0
    """Known tokens when it took its slot; after them every token is a decode."""
    num_found: int | None = None
    """Known tokens that were there when it was looked up, waiting; None if it was not."""
    is_named: bool = False
    """Whether its pages were named while it waited: done once, for where a prompt is long it takes milliseconds."""
    num_cached: int = 0
    """Prompt tokens that were in pages already when it first took its slot."""
    queued_s: float | None = None
    """How long it waited for its first chunk; None until then."""
    has_output: bool = False
    was_preempted: bool = False
    is_finished: bool = False

    def __post_init__(self) -> None:
        self.request_id = self.submit.request_id
        self.sampling = self.submit.sampling
        is_scored = self.sampling.prompt_logprobs is not None
        self.salt = secrets.token_bytes(16) if is_scored else self.submit.prompt.salt
        self.num_prompt = len(self.submit.prompt)
        self.token_ids = [*self.submit.prompt.token_ids, *self.submit.resume_token_ids]

    @property
    def order(self) -> tuple[int, int]:
        """Smaller goes first: priority, then arrival."""
        return (-self.submit.priority, self.arrival)

    @property
    def is_prepared(self) -> bool:
        """Whether nothing that must precede its first token is still being built."""
        return self.constraint is None or self.constraint.is_ready

    @property
    def problem(self) -> str | None:
        """Why it cannot go on; None while it can."""
        return self.constraint.problem if self.constraint is not None else None

    @property
    def num_generated(self) -> int:
        """Known tokens of the output."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Known tokens and those on their way."""
        return len(self.token_ids) + self.num_pending

    @property
    def max_chunk_end(self) -> int:
        """Where its next chunk must end: logits at every position of a chunk take room."""
        num_known = len(self.token_ids)
        is_scored = self.sampling.prompt_logprobs is not None and self.num_computed < self.num_prompt
        return min(num_known, self.num_computed + MAX_SCORED) if is_scored else num_known

    @property
    def prefill_end(self) -> int:
        """Where its prefill ends, or will end once it has a slot."""
        return len(self.token_ids) if self.slot is None else self.num_to_prefill

    @property
    def is_prefilling(self) -> bool:
        """Whether known tokens must still be computed before it decodes."""
        return self.num_computed < self.num_to_prefill

    @property
    def can_decode(self) -> bool:
        """Whether one more token may be sampled from its last one."""
        return self.num_computed >= self.num_to_prefill and self.num_tokens < self.max_len

    @property
    def has_chunk(self) -> bool:
        """Whether more than its last sampled token may be known, or known to follow, and not be computed."""
        constraint = self.constraint
        if constraint is None:
            return False
        return bool(constraint.forced) or self.num_computed < self.forced_start + len(self.forced)

    @property
    def following(self) -> tuple[int, ...]:
        """What must follow the one token that is being sampled; nothing where somebody asks for its odds."""
        constraint = self.constraint
        if constraint is None or not constraint.forced or self.num_pending != 1 or self.sampling.logprobs is not None:
            return ()
        # They were told with the masks taken last: if it sat out a step, these were not for that token.
        is_next = self.num_prompt + constraint.num_taken + 1 == self.num_tokens
        return constraint.forced[: self.max_len - self.num_tokens] if is_next else ()

    def force(self, token_ids: tuple[int, ...]) -> None:
        """These will follow the token that is being sampled."""
        self.forced, self.forced_start = token_ids, self.num_tokens
        self.num_pending += len(token_ids)

    def known_token(self, position: int) -> int | None:
        """The token at a position behind the prefill if it was forced; None if it was, or is being, sampled."""
        index = position - self.forced_start
        return self.forced[index] if 0 <= index < len(self.forced) else None

    def append_forced(self) -> tuple[tuple[int, ...], FinishReason | None]:
        """Append what is forced behind the last token, up to the end; returns that, and why it ends if it does."""
        if self.forced_start != len(self.token_ids):
            return (), None
        self.num_pending -= len(self.forced)
        for count, token_id in enumerate(self.forced, start=1):
            self.token_ids.append(token_id)
            if reason := self.finish_reason():
                return self.forced[:count], reason
        return self.forced, None

    def start(self, *, num_cached: int, checkpoint: int | None) -> NewSequence:
        """What the runner is told when it takes its slot."""
        assert self.slot is not None
        prompt = self.submit.prompt.token_ids
        known = prompt if len(prompt) == len(self.token_ids) else tuple(self.token_ids)
        return NewSequence(
            self.slot, self.sampling, known, self.num_prompt, num_cached=num_cached, checkpoint=checkpoint
        )

    def finish_reason(self) -> FinishReason | None:
        """Why the known tokens end the sequence, or None if they do not."""
        last, num_generated = self.token_ids[-1], self.num_generated
        if self.constraint is not None and num_generated > 0 and self.constraint.ends_with(last):
            return FinishReason.STOP
        if last in self.sampling.stop_token_ids and num_generated > self.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_len else None
