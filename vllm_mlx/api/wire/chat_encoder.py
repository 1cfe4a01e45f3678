"""Events of a chat request to OpenAI's chunks, and their fold to OpenAI's answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import msgspec

from vllm_mlx.api.wire.answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletionAnswer,
    ChatLogprobs,
    ChatMessageAnswer,
    ChunkChoice,
    Delta,
    TokenLogprobAnswer,
    TopLogprobAnswer,
    UsageAnswer,
)
from vllm_mlx.api.wire.call_encoder import CallEncoder
from vllm_mlx.api.wire.prompt_logprobs import prompt_logprobs
from vllm_mlx.api.wire.usage import AnswerHead, Cache, usage_answer
from vllm_mlx.chat.collect import Collected, CollectedChoice
from vllm_mlx.core.events import Event, Finish, ReasoningDelta, TextDelta, TokenInfo, ToolCallDelta, Usage
from vllm_mlx.core.messages import FinishReason

_ROLE = Delta(role="assistant", content="")
_NOTHING = Delta()


class ChatEncoder:
    """One request's answer. `include_usage` puts null in every chunk and the counts in one more at the end;
    `include_reasoning=False` leaves out what the model thought.
    """

    def __init__(
        self,
        head: AnswerHead,
        *,
        has_logprobs: bool,
        include_usage: bool,
        include_reasoning: bool = True,
        service_tier: str = "default",
        prompt_count: int | None = None,
        custom_tools: Collection[str] = (),
    ) -> None:
        """`prompt_count`: candidates for `prompt_logprobs`, if these were asked for; `custom_tools`: names of those."""
        self._head = head
        self._has_logprobs = has_logprobs
        self._include_reasoning = include_reasoning
        self._service_tier = service_tier
        self._prompt_count = prompt_count
        self._calls = CallEncoder(custom_tools)
        self._usage: UsageAnswer | msgspec.UnsetType | None = None if include_usage else msgspec.UNSET
        self._opened: set[int] = set()

    def chunks(self, event: Event) -> Iterator[ChatChunk]:
        """What to send for one event; a choice opens with its role alone."""
        if event.choice not in self._opened:
            self._opened.add(event.choice)
            yield self._chunk([ChunkChoice(event.choice, _ROLE)])
        match event:
            case TextDelta() if event.text or event.tokens:
                yield self._piece(event.choice, Delta(content=event.text), event.tokens)
            case ReasoningDelta() if event.tokens or (event.text and self._include_reasoning):
                is_shown = self._include_reasoning
                delta = Delta(reasoning_content=event.text, reasoning=event.text) if is_shown else _NOTHING
                yield self._piece(event.choice, delta, event.tokens)
            case ToolCallDelta():
                for piece in self._calls.pieces(event):
                    yield self._piece(event.choice, Delta(tool_calls=[piece]), ())
            case Finish():
                for piece in self._calls.last(event.choice):
                    yield self._piece(event.choice, Delta(tool_calls=[piece]), ())
                reason = _reason(event.reason, has_calls=self._calls.has_called(event.choice))
                chunk = self._chunk([ChunkChoice(event.choice, _NOTHING, None, reason, _ids(event.token_ids))])
                yield msgspec.structs.replace(chunk, prompt_token_ids=_ids(event.prompt_token_ids))

    def last_chunk(self, usage: Usage, cache: Cache) -> ChatChunk | None:
        """The chunk of counts and of the cache report, if the stream includes one of them."""
        if self._usage is msgspec.UNSET:
            return None if cache is msgspec.UNSET else msgspec.structs.replace(self._chunk([]), cache=cache)
        return msgspec.structs.replace(self._chunk([]), usage=usage_answer(usage), cache=cache)

    def answer(self, collected: Collected, cache: Cache) -> ChatCompletionAnswer:
        """The whole answer at once."""
        head = self._head
        choices = [self._choice(index, choice) for index, choice in enumerate(collected.choices)]
        usage = usage_answer(collected.usage)
        fingerprint = head.system_fingerprint
        prompt_ids = _ids(collected.choices[0].prompt_token_ids) if collected.choices else msgspec.UNSET
        return ChatCompletionAnswer(
            head.id,
            head.created,
            head.model,
            choices,
            usage,
            fingerprint,
            self._service_tier,
            prompt_ids,
            cache=cache,
            prompt_logprobs=prompt_logprobs(collected.choices[0].prompt, count=self._prompt_count),
        )

    def _choice(self, index: int, choice: CollectedChoice) -> ChatChoice:
        thought = (choice.reasoning if self._include_reasoning else "") or msgspec.UNSET
        calls = [self._calls.whole(call) for call in choice.tool_calls]
        text = choice.text or (None if calls else "")
        message = ChatMessageAnswer(text, thought, thought, calls or msgspec.UNSET)
        reason = _reason(choice.reason, has_calls=bool(calls))
        return ChatChoice(index, message, self._logprobs(choice.tokens), reason, _ids(choice.token_ids))

    def _piece(self, choice: int, delta: Delta, tokens: Sequence[TokenInfo]) -> ChatChunk:
        return self._chunk([ChunkChoice(choice, delta, self._logprobs(tokens) if tokens else None)])

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        head = self._head
        return ChatChunk(head.id, head.created, head.model, head.system_fingerprint, choices, self._usage)

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> ChatLogprobs | None:
        return ChatLogprobs([token_answer(token) for token in tokens]) if self._has_logprobs else None


def _ids(token_ids: Sequence[int]) -> list[int] | msgspec.UnsetType:
    return list(token_ids) or msgspec.UNSET


def _reason(reason: FinishReason, *, has_calls: bool) -> str:
    """A choice that stopped after tool calls waits for their results; one that was cut off does not."""
    return "tool_calls" if has_calls and reason is FinishReason.STOP else reason.value


def token_answer(info: TokenInfo) -> TokenLogprobAnswer:
    """A generated token with its log-probability, as OpenAI writes it."""
    top = [TopLogprobAnswer(t.token, t.logprob, list(t.bytes)) for t in info.top]
    return TokenLogprobAnswer(info.token, info.logprob, list(info.bytes), top)
