"""Events of a chat request to OpenAI's chunks, and their fold to OpenAI's answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from vllm_mlx.api.wire.usage import AnswerHead, Cache, usage_answer
from vllm_mlx.chat.collect import Collected
from vllm_mlx.core.events import Event, Finish, TextDelta, TokenInfo, Usage

_ROLE = Delta(role="assistant", content="")
_NOTHING = Delta()


class ChatEncoder:
    """One request's answer. `include_usage` puts null in every chunk and the counts in one more at the end."""

    def __init__(self, head: AnswerHead, *, has_logprobs: bool, include_usage: bool) -> None:
        self._head = head
        self._has_logprobs = has_logprobs
        self._usage: UsageAnswer | msgspec.UnsetType | None = None if include_usage else msgspec.UNSET
        self._opened: set[int] = set()

    def chunks(self, event: Event) -> Iterator[ChatChunk]:
        """What to send for one event; a choice opens with its role alone."""
        if event.choice not in self._opened:
            self._opened.add(event.choice)
            yield self._chunk([ChunkChoice(event.choice, _ROLE)])
        match event:
            case TextDelta() if event.text or event.tokens:
                logprobs = self._logprobs(event.tokens) if event.tokens else None
                yield self._chunk([ChunkChoice(event.choice, Delta(content=event.text), logprobs)])
            case Finish():
                yield self._chunk([ChunkChoice(event.choice, _NOTHING, None, event.reason.value)])

    def last_chunk(self, usage: Usage, cache: Cache) -> ChatChunk | None:
        """The chunk of counts and of the cache report, if the stream includes one of them."""
        if self._usage is msgspec.UNSET:
            return None if cache is msgspec.UNSET else msgspec.structs.replace(self._chunk([]), cache=cache)
        return msgspec.structs.replace(self._chunk([]), usage=usage_answer(usage), cache=cache)

    def answer(self, collected: Collected, cache: Cache) -> ChatCompletionAnswer:
        """The whole answer at once."""
        head = self._head
        choices = [
            ChatChoice(index, ChatMessageAnswer(choice.text), self._logprobs(choice.tokens), choice.reason.value)
            for index, choice in enumerate(collected.choices)
        ]
        usage = usage_answer(collected.usage)
        fingerprint = head.system_fingerprint
        return ChatCompletionAnswer(head.id, head.created, head.model, choices, usage, fingerprint, cache=cache)

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        head = self._head
        return ChatChunk(head.id, head.created, head.model, head.system_fingerprint, choices, self._usage)

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> ChatLogprobs | None:
        return ChatLogprobs([_token(token) for token in tokens]) if self._has_logprobs else None


def _token(info: TokenInfo) -> TokenLogprobAnswer:
    top = [TopLogprobAnswer(t.token, t.logprob, list(t.bytes)) for t in info.top]
    return TokenLogprobAnswer(info.token, info.logprob, list(info.bytes), top)
