"""Events of a completion request to OpenAI's chunks, and their fold to OpenAI's answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec

from vllm_mlx.api.wire.answers import CompletionAnswer, TextChoice, TextLogprobs, UsageAnswer
from vllm_mlx.api.wire.best_of import Best
from vllm_mlx.api.wire.prompt_logprobs import prompt_logprobs
from vllm_mlx.api.wire.usage import AnswerHead, Cache, usage_answer
from vllm_mlx.chat.collect import Collected, CollectedChoice
from vllm_mlx.core.events import Event, Finish, PromptScored, PromptToken, TextDelta, TokenInfo, TopLogprob, Usage
from vllm_mlx.core.sampling import MAX_TOP_LOGPROBS


class CompletionEncoder:
    """One request's answer. `include_usage` puts null in every chunk and the counts in one more at the end."""

    def __init__(
        self,
        head: AnswerHead,
        *,
        has_logprobs: bool,
        include_usage: bool,
        num_top: int = MAX_TOP_LOGPROBS,
        echoes: bool = False,
        prompt_count: int | None = None,
        best: Best | None = None,
    ) -> None:
        """`num_top`: alternatives of each token; `echoes`: the prompt's tokens are part of the log-probabilities;
        `prompt_count`: candidates for `prompt_logprobs`; `best`: which choices are returned.
        """
        self._head = head
        self._has_logprobs = has_logprobs
        self._num_top = num_top
        self._echoes = echoes
        self._prompt_count = prompt_count
        self._best = best
        self._usage: UsageAnswer | msgspec.UnsetType | None = None if include_usage else msgspec.UNSET
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def chunks(self, event: Event) -> Iterator[CompletionAnswer]:
        """What to send for one event: nothing if it has no text, tokens or end."""
        match event:
            case PromptScored() if self._echoes:
                yield self._chunk([TextChoice(event.choice, "", self._logprobs(event.choice, event.tokens))])
            case TextDelta() if event.text or event.tokens:
                logprobs = self._logprobs(event.choice, event.tokens) if event.tokens else None
                yield self._chunk([TextChoice(event.choice, event.text, logprobs)])
            case Finish():
                yield self._chunk([TextChoice(event.choice, "", None, event.reason.value)])

    def last_chunk(self, usage: Usage, cache: Cache) -> CompletionAnswer | None:
        """The chunk of counts and of the cache report, if the stream includes one of them."""
        if self._usage is msgspec.UNSET:
            return None if cache is msgspec.UNSET else msgspec.structs.replace(self._chunk([]), cache=cache)
        return msgspec.structs.replace(self._chunk([]), usage=usage_answer(usage), cache=cache)

    def answer(self, collected: Collected, cache: Cache) -> CompletionAnswer:
        """The whole answer at once."""
        shown = self._best.of(collected) if self._best else collected.choices
        choices = [self._choice(index, choice) for index, choice in enumerate(shown)]
        return msgspec.structs.replace(self._chunk(choices), usage=usage_answer(collected.usage), cache=cache)

    def _choice(self, index: int, choice: CollectedChoice) -> TextChoice:
        echoed = choice.prompt if self._echoes else ()
        tokens: list[TokenInfo | PromptToken] = [*echoed, *choice.tokens]
        scored = prompt_logprobs(choice.prompt, count=self._prompt_count)
        return TextChoice(index, choice.text, self._logprobs(index, tokens), choice.reason.value, scored)

    def _chunk(self, choices: list[TextChoice]) -> CompletionAnswer:
        head = self._head
        return CompletionAnswer(head.id, head.created, head.model, head.system_fingerprint, choices, self._usage)

    def _logprobs(self, choice: int, tokens: Sequence[TokenInfo | PromptToken]) -> TextLogprobs | None:
        """Offsets go on from where the choice's earlier tokens ended."""
        if not self._has_logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice])
            is_text = token.is_text if isinstance(token, PromptToken) else True
            self._offsets[choice] += _num_characters(token.bytes) if is_text else 0
        return TextLogprobs(
            tokens=[_name(token) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=offsets,
        )

    def _top(self, token: TokenInfo | PromptToken) -> dict[str, float] | None:
        """By text; of several tokens with one text the most likely."""
        if token.logprob is None:
            return None
        return {_name(top): top.logprob for top in reversed(token.top[: self._num_top])}


def _name(token: TokenInfo | PromptToken | TopLogprob) -> str:
    """The token's text; if it is no whole characters then its bytes, so that different tokens differ."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def _num_characters(data: bytes) -> int:
    """Characters that begin in these bytes: all but UTF-8's continuation bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in data)
