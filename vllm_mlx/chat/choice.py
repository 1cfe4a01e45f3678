"""One choice of an answer: the engine's tokens in, events out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from vllm_mlx.chat.detokenize import Detokenizer
from vllm_mlx.chat.output_formats import OutputFormats
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.prompt_scores import PromptScores
from vllm_mlx.chat.stop import StopMatcher
from vllm_mlx.chat.thinking import ThinkingLimit
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.events import (
    Event,
    Finish,
    ReasoningDelta,
    TextDelta,
    TokenInfo,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from vllm_mlx.core.messages import FinishReason, Output
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import TokenLogprobs


class Reading(msgspec.Struct, frozen=True):
    """How a choice's text is read."""

    parser: OutputParser
    """Of this choice alone."""
    formats: OutputFormats
    max_calls: int | None = None
    """The choice ends before it has more tool calls than these."""
    is_shaped: bool = False
    """Whether the answer has a shape: the lines between reasoning and answer are not part of it."""
    limit: ThinkingLimit | None = None
    """When its reasoning ends by force; of this choice alone."""


class ChoiceDecoder:
    """Reads the outputs of one sequence until it ends or its text reaches a stop string.

    Stop strings are looked for in the answer and in reasoning, each on its own, never inside tool calls.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        choice: int,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stream_interval: int = 1,
        echo: str = "",
        counts_prompt: bool = True,
        reading: Reading | None = None,
        tells_token_ids: bool = False,
        is_prompt_only: bool = False,
        reports_end: bool = False,
    ) -> None:
        """`echo` begins the text. `counts_prompt`: whether this choice's usage has the prompt's tokens. Without
        `reading` all text is the answer. `tells_token_ids`: whether its end has them. `is_prompt_only`, `reports_end`:
        see `core.chat.CompletionRequest`.
        """
        self._tokenizer = tokenizer
        self._choice = choice
        self._prompt_tokens = len(prompt_ids) if counts_prompt else 0
        self.counts_prompt = counts_prompt
        """Whether this choice's usage has the prompt's tokens."""
        self._sampling = sampling
        self._stream_interval = stream_interval
        self._reading = reading
        self._parser = reading.parser if reading else None
        self._special = reading.formats.special if reading and sampling.skip_special_tokens else None
        self._detokenizer = Detokenizer(tokenizer, context=prompt_ids, hidden_ids=_hidden_ids(sampling, reading))
        self._stop = StopMatcher(sampling.stop)
        self._kind: type[TextDelta | ReasoningDelta] = TextDelta
        self._waiting: list[Event] = [TextDelta(choice, echo)] if echo else []
        """Events to send."""
        self._num_tokens = self._num_sent = self._num_thought = 0
        self.num_cached: int | None = None
        """Tokens of the prompt that did not have to be computed; None before the first output."""
        self._queued_s: float | None = None
        self._num_decoded = self._num_released = 0
        self._infos: deque[tuple[int, TokenInfo]] = deque()
        """Tokens not yet reported, each with where in the generated text its own text begins."""
        self._scores: PromptScores | None = None
        if sampling.prompt_logprobs is not None:
            self._scores = PromptScores(tokenizer, choice=choice, prompt_ids=prompt_ids)
        self._awaits_shape = reading is not None and reading.is_shaped
        self._is_prompt_only, self._reports_end = is_prompt_only, reports_end
        self._has_enough = False
        self._limit = reading.limit if reading else None
        self._told_prompt_ids = tuple(prompt_ids) if tells_token_ids else None
        self._token_ids: list[int] = []
        """Of the output, as far as the limit may need them."""
        self._going_on: tuple[int, ...] | None = None
        self._was_resumed = False
        self.is_finished = False
        """After the `Finish` event; no output is wanted any more."""

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._num_tokens,
            cached_tokens=(self.num_cached or 0) if self.counts_prompt else 0,
            reasoning_tokens=self._num_thought,
        )

    def read(self, output: Output) -> list[Event]:
        """Events that this output gives, perhaps none. Its finish must be STOP, LENGTH or None."""
        scored = self._scores.read(output) if self._scores is not None else []
        if self._is_prompt_only and (output.token_ids or output.finish):
            output = msgspec.structs.replace(output, token_ids=(), logprobs=None, finish=FinishReason.LENGTH)
        return [*scored, *self._read(output)]

    def _read(self, output: Output) -> list[Event]:
        if not self._was_resumed:  # what its own tokens found says nothing of the prompt
            self.num_cached = max(self.num_cached or 0, output.num_cached)
            self._queued_s = output.queued_s if output.queued_s is not None else self._queued_s
        has_stop_token = output.finish is FinishReason.STOP and not self._sampling.include_stop_str_in_output
        num_shown = len(output.token_ids) - has_stop_token
        for index, token_id in enumerate(output.token_ids[:num_shown]):
            self._take(token_id, output.logprobs[index] if output.logprobs else None)
            if self._stop.matched is not None or self._has_enough:
                return self._finish(FinishReason.STOP)
            if self._ends_reasoning(token_id):
                self.close_reasoning()
                return self._delta()
        if output.finish is not None:
            self._num_tokens += has_stop_token
            self._token_ids += output.token_ids[num_shown:]
            if has_stop_token and self._reports_end and output.logprobs and output.logprobs[-1]:
                self._infos.append((self._num_decoded, self._info(output.token_ids[-1], output.logprobs[-1])))
            return self._end(output.finish)
        if self._num_tokens - self._num_sent < self._stream_interval:
            return []
        return self._delta()

    def close_reasoning(self) -> None:
        """End reasoning here: the sequence must go on from `take_continuation`, whatever else the engine gave."""
        assert self._limit is not None
        self._limit.is_used = True
        for token_id in self._limit.closing_ids:
            self._take(token_id, None)
        self._going_on = tuple(self._token_ids)

    def take_continuation(self) -> tuple[int, ...] | None:
        """Output tokens in place of those that the engine has, once; None if it may go on as it is."""
        token_ids, self._going_on = self._going_on, None
        self._was_resumed = self._was_resumed or (token_ids is not None and self.num_cached is not None)
        return token_ids

    def _ends_reasoning(self, token_id: int) -> bool:
        limit = self._limit
        if limit is None or self._parser is None or not self._parser.is_thinking:
            return False
        return limit.add(token_id, num_output=self._num_tokens)

    def _take(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Count one token and release the text that it makes certain."""
        self._num_tokens += 1
        if self._limit is not None or self._told_prompt_ids is not None:
            self._token_ids.append(token_id)
        if logprobs is not None:
            self._infos.append((self._num_decoded, self._info(token_id, logprobs)))
        text = self._detokenizer.add(token_id)
        was_thinking = self._parser is not None and self._parser.is_thinking
        events = self._read_text(text)
        if self._parser is not None:
            is_thought = was_thinking or self._parser.is_thinking
            self._num_thought += is_thought or any(isinstance(event, ReasoningDelta) for event in events)
        self._pass(events)

    def _read_text(self, text: str) -> Sequence[Event]:
        self._num_decoded += len(text)
        if self._parser is not None:
            return self._parser.feed(text)
        return (TextDelta(self._choice, text),) if text else ()

    def _end(self, reason: FinishReason) -> list[Event]:
        """The sequence ended by itself: what was held back is certain now."""
        self._pass(self._read_text(self._detokenizer.finish()))
        if self._parser is not None and self._stop.matched is None and not self._has_enough:
            self._pass(self._parser.finish())
        if self._stop.matched is None:
            self._let_go()
            self._num_released = self._num_decoded
        return self._finish(reason)

    def _pass(self, events: Sequence[Event]) -> None:
        """Look for stop strings, and keep the rest to be sent."""
        max_calls = self._reading.max_calls if self._reading else None
        for event in events:
            if isinstance(event, TextDelta | ReasoningDelta):
                self._pass_text(type(event), event.text)
            elif isinstance(event, ToolCallDelta):
                self._let_go()
                if max_calls is not None and event.index >= max_calls:
                    self._has_enough = True
                else:
                    self._num_released = self._num_decoded
                    self._keep(event)
            if self._stop.matched is not None or self._has_enough:
                return

    def _pass_text(self, kind: type[TextDelta | ReasoningDelta], text: str) -> None:
        """Pass new text through the stop matcher, which is not asked before `min_tokens`."""
        if self._special is not None:
            text = self._special.sub("", text)
        if kind is not self._kind:
            self._let_go()
            self._kind, self._stop = kind, StopMatcher(self._sampling.stop)
        if self._awaits_shape and self._num_thought and kind is TextDelta:
            text = text.lstrip("\n")
            self._awaits_shape = not text
        num_before = self._num_decoded - len(text) - self._stop.num_held
        shown = self._stop.add(text) if self._num_tokens >= self._sampling.min_tokens else text
        if self._stop.matched is not None:
            self._num_released = num_before + len(shown)
            shown += self._stop.matched if self._sampling.include_stop_str_in_output else ""
        else:
            self._num_released = self._num_decoded - self._stop.num_held
        if shown:
            self._keep(kind(self._choice, shown))

    def _let_go(self) -> None:
        """What might have become a stop string has not."""
        if self._stop.num_held:
            self._keep(self._kind(self._choice, self._stop.finish()))
            self._stop = StopMatcher(self._sampling.stop)

    def _keep(self, event: Event) -> None:
        """Join it to the last event if the two are one piece."""
        last = self._waiting[-1] if self._waiting else None
        if isinstance(event, TextDelta | ReasoningDelta) and isinstance(last, type(event)):
            self._waiting[-1] = type(event)(self._choice, last.text + event.text)
        elif isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta) and event.id is None:
            joined = last.arguments + event.arguments
            self._waiting[-1] = msgspec.structs.replace(last, arguments=joined)
        else:
            self._waiting.append(event)

    def _delta(self) -> list[Event]:
        """What can be sent now. A token goes with the first of its characters, or with what follows it."""
        is_all_out = self._num_released == self._num_decoded
        tokens = []
        while self._infos and (is_all_out or self._infos[0][0] < self._num_released):
            tokens.append(self._infos.popleft()[1])
        events, self._waiting = self._waiting, []
        self._num_sent = self._num_tokens
        if tokens and not (events and isinstance(events[0], TextDelta | ReasoningDelta)):
            events.insert(0, TextDelta(self._choice, "", tuple(tokens)))
        elif tokens:
            events[0] = msgspec.structs.replace(events[0], tokens=tuple(tokens))
        return events

    def _finish(self, reason: FinishReason) -> list[Event]:
        self.is_finished = True
        end = Finish(self._choice, reason, self.usage, self._stop.matched, self._queued_s)
        if self._told_prompt_ids is not None:
            told = self._told_prompt_ids
            end = msgspec.structs.replace(end, prompt_token_ids=told, token_ids=tuple(self._token_ids))
        return [*self._delta(), end]

    def _info(self, token_id: int, logprobs: TokenLogprobs) -> TokenInfo:
        top = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        text, token_bytes = self._tokenizer.token_text, self._tokenizer.token_bytes
        return TokenInfo(
            token=text(token_id),
            bytes=token_bytes(token_id),
            logprob=logprobs.logprob,
            top=tuple(TopLogprob(text(top_id), token_bytes(top_id), value) for top_id, value in top),
        )


def _hidden_ids(sampling: SamplingParams, reading: Reading | None) -> frozenset[int] | None:
    """Tokens that are no text; None: the special ones."""
    if not sampling.skip_special_tokens:
        return frozenset()
    return reading.formats.hidden_ids if reading else None
