"""One choice of an answer: the engine's tokens in, events out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vllm_mlx.chat.detokenize import Detokenizer
from vllm_mlx.chat.stop import StopMatcher
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.events import Event, Finish, TextDelta, TokenInfo, TopLogprob, Usage
from vllm_mlx.core.messages import FinishReason, Output
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import TokenLogprobs


class ChoiceDecoder:
    """Reads the outputs of one sequence until it ends or its text reaches a stop string."""

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
    ) -> None:
        """`echo` begins the text. `counts_prompt`: whether this choice's usage has the prompt's tokens."""
        self._tokenizer = tokenizer
        self._choice = choice
        self._prompt_tokens = len(prompt_ids) if counts_prompt else 0
        self.counts_prompt = counts_prompt
        """Whether this choice's usage has the prompt's tokens."""
        self._min_tokens = sampling.min_tokens
        self._stream_interval = stream_interval
        self._detokenizer = Detokenizer(tokenizer, context=prompt_ids)
        self._stop = StopMatcher(sampling.stop)
        self._text = echo
        self._num_tokens = self._num_sent = 0
        self.num_cached: int | None = None
        """Tokens of the prompt that did not have to be computed; None before the first output."""
        self._queued_s: float | None = None
        self._num_decoded = self._num_released = 0
        self._infos: deque[tuple[int, TokenInfo]] = deque()
        """Tokens not yet reported, each with where in the generated text its own text begins."""
        self.is_finished = False
        """After the `Finish` event; no output is wanted any more."""

    def read(self, output: Output) -> list[Event]:
        """Events that this output gives, perhaps none. Its finish must be STOP, LENGTH or None."""
        self.num_cached = max(self.num_cached or 0, output.num_cached)
        if output.queued_s is not None:
            self._queued_s = output.queued_s
        has_stop_token = output.finish is FinishReason.STOP
        num_shown = len(output.token_ids) - has_stop_token
        for index, token_id in enumerate(output.token_ids[:num_shown]):
            self._take(token_id, output.logprobs[index] if output.logprobs else None)
            if self._stop.matched is not None:
                return self._finish(FinishReason.STOP)
        if output.finish is not None:
            self._num_tokens += has_stop_token
            self._release(self._detokenizer.finish())
            if self._stop.matched is None:
                self._keep(self._stop.finish())
            return self._finish(output.finish)
        if self._num_tokens - self._num_sent < self._stream_interval:
            return []
        return self._delta()

    def _take(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Count one token and release the text that it makes certain."""
        self._num_tokens += 1
        if logprobs is not None:
            self._infos.append((self._num_decoded, self._info(token_id, logprobs)))
        self._release(self._detokenizer.add(token_id))

    def _release(self, text: str) -> None:
        """Pass new text through the stop matcher, which is not asked before `min_tokens`."""
        self._num_decoded += len(text)
        self._keep(self._stop.add(text) if self._num_tokens >= self._min_tokens else text)

    def _keep(self, text: str) -> None:
        self._num_released += len(text)
        self._text += text

    def _delta(self) -> list[Event]:
        """What can be sent now. A token goes with the first of its characters."""
        is_all_out = self._num_released == self._num_decoded
        tokens = []
        while self._infos and (is_all_out or self._infos[0][0] < self._num_released):
            tokens.append(self._infos.popleft()[1])
        text, self._text = self._text, ""
        self._num_sent = self._num_tokens
        return [TextDelta(self._choice, text, tuple(tokens))] if text or tokens else []

    def _finish(self, reason: FinishReason) -> list[Event]:
        self.is_finished = True
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._num_tokens,
            cached_tokens=(self.num_cached or 0) if self.counts_prompt else 0,
        )
        return [*self._delta(), Finish(self._choice, reason, usage, self._stop.matched, self._queued_s)]

    def _info(self, token_id: int, logprobs: TokenLogprobs) -> TokenInfo:
        top = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        text, token_bytes = self._tokenizer.token_text, self._tokenizer.token_bytes
        return TokenInfo(
            token=text(token_id),
            bytes=token_bytes(token_id),
            logprob=logprobs.logprob,
            top=tuple(TopLogprob(text(top_id), token_bytes(top_id), value) for top_id, value in top),
        )
