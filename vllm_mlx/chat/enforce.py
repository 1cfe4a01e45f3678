"""What a request asks to be guaranteed, as opposed to hoped for."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.constrain import CallPlan, Constrainer
from vllm_mlx.chat.encode import callable_tools
from vllm_mlx.chat.output_formats import OutputFormats
from vllm_mlx.core.chat import ChatRequest, CompletionRequest, Tool
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.sampling import SamplingParams

log = get_logger("chat")


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
        tools = callable_tools(request)
        if request.tool_choice.mode == "required" and not tools:
            raise InvalidRequest("tool_choice cannot force a call: there are no tools.", param="tool_choice")
        form = self._formats.tools
        if tools:
            plan = self._plan(request, tail)
            if form is not None:
                syntax = form.syntax(self._formats.template)
                return await self._with_calls(request, tools, syntax, plan, vocab_size=vocab_size)
            if plan.kind == "required":
                why = "no calls are read here (--tool-call-parser none)"
                raise InvalidRequest(f"tool_choice cannot force a call: {why}.", param="tool_choice")
        if request.output is None:
            return await self._own(request.sampling, vocab_size=vocab_size)
        grammar = await self._constrainer.grammar(
            request.output, vocab_size=vocab_size, reasoning=self._formats.reasoning, tail=tail
        )
        return self._with(request.sampling, grammar)

    def _plan(self, request: ChatRequest, tail: str) -> CallPlan:
        """Where calls may stand."""
        is_parallel, reasoning = request.parallel_tool_calls, self._formats.reasoning
        if request.tool_choice.mode == "required":
            # A tool asked for by its name is called once; a model that was not taught to call would never end.
            is_open = is_parallel and len(request.tool_choice.names) != 1 and self._formats.knows_tools
            return CallPlan("required", is_open, reasoning, tail)
        if request.output is not None:
            return CallPlan("or_shape", is_parallel, reasoning, tail, request.output)
        return CallPlan("lazy", is_parallel, reasoning, tail)

    async def _with_calls(
        self, request: ChatRequest, tools: Sequence[Tool], syntax: CallSyntax, plan: CallPlan, *, vocab_size: int
    ) -> SamplingParams:
        """Sampling that holds calls to their schemas; those that nobody insisted on, if that can be done."""
        sampling = request.sampling
        is_owed = plan.kind != "lazy" or any(tool.is_strict or tool.syntax is not None for tool in tools)
        if not is_owed and sampling.grammar is not None:
            return await self._own(sampling, vocab_size=vocab_size)
        try:
            grammar = await self._constrainer.with_calls(tools, syntax, plan, vocab_size=vocab_size)
        except InvalidRequest as error:
            if is_owed:
                raise
            log.debug("calls are not held to their schemas: %s", error.message)
            return sampling
        return self._with(sampling, grammar).replace(grammar_yields=not is_owed)

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
