"""What a request asks to be guaranteed, as opposed to hoped for."""

from __future__ import annotations

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.output_formats import OutputFormats
from vllm_mlx.core.chat import ChatRequest, CompletionRequest
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import SamplingParams


class Enforcer:
    """Makes certain what requests to one model ask for. Used on one event loop."""

    def __init__(self, constrainer: Constrainer, formats: OutputFormats) -> None:
        self._constrainer = constrainer
        self._formats = formats

    async def chat(self, request: ChatRequest, *, vocab_size: int, tail: str) -> SamplingParams:
        """The request's sampling, with what makes its tool choice and the shape of its answer certain.

        `tail` is what the template wrote behind the last message.

        Raises:
            InvalidRequest: it cannot be made certain; `param` names the field.
        """
        if request.tool_choice.mode == "required":
            reason = "tool_choice cannot force a call here: 'auto' and 'none' are offered."
            if self._formats.tools is None:
                reason = "tool_choice cannot force a call: this server reads no calls (--tool-call-parser none)."
            raise InvalidRequest(reason, param="tool_choice")
        if request.output is None:
            return await self._own(request.sampling, vocab_size=vocab_size)
        if request.tools and request.tool_choice.mode != "none":
            param = request.output.param
            raise InvalidRequest(f"{param} cannot be combined with tools here; send tool_choice 'none'.", param=param)
        grammar = await self._constrainer.grammar(
            request.output, vocab_size=vocab_size, reasoning=self._formats.reasoning, tail=tail
        )
        return self._with(request.sampling, grammar)

    async def completion(self, request: CompletionRequest, *, vocab_size: int) -> SamplingParams:
        """The same for raw text, whose shape holds from the first token on."""
        if request.output is None:
            return await self._own(request.sampling, vocab_size=vocab_size)
        return self._with(request.sampling, await self._constrainer.grammar(request.output, vocab_size=vocab_size))

    async def _own(self, sampling: SamplingParams, *, vocab_size: int) -> SamplingParams:
        """Sampling that may bring a grammar itself."""
        if sampling.grammar is not None:
            await self._constrainer.check(sampling.grammar, vocab_size=vocab_size)
        return sampling

    def _with(self, sampling: SamplingParams, grammar: str) -> SamplingParams:
        if sampling.grammar is not None:
            raise InvalidRequest("grammar cannot be combined with another shape of the answer.", param="grammar")
        return sampling.replace(grammar=grammar)
