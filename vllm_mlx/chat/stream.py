"""The events of a running request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from vllm_mlx.chat.choice import ChoiceDecoder
from vllm_mlx.chat.explain import Explanation
from vllm_mlx.core.errors import EngineFailure, RequestError, RequestTimeout, ServerBusy
from vllm_mlx.core.events import Event, Usage
from vllm_mlx.core.messages import EngineClient, EngineState, FinishReason, Output, Submit

Explain = Callable[[Sequence[int]], tuple[Explanation, ...]]
"""Tokens found of each prompt -> why no more."""


class EventStream:
    """Events of all choices as they come; each choice's last one is its `Finish`.

    Iterating raises ServerBusy if the engine's queue is full, RequestTimeout, and EngineFailure if the engine fails
    on it. An error ends all choices, and comes after the events that were there before it. Leaving the
    `async with` block (or `aclose`) stops the engine's work on the request, so always do one of them.
    """

    def __init__(
        self,
        engine: EngineClient,
        choices: Sequence[tuple[Submit, ChoiceDecoder]],
        *,
        prompt_tokens: int,
        timeout_s: float | None = None,
        on_tokens: Callable[[str, Sequence[int]], None] | None = None,
        explain: Explain | None = None,
        marks: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Submit every choice; call it on the event loop that runs the engine client.

        `on_tokens` is called with a sequence's id and its new tokens.
        """
        self.prompt_tokens = prompt_tokens
        """Tokens of all prompts."""
        self.marks = tuple(marks)
        """Beginnings of the prompt that its request wants kept: tokens, and seconds."""
        self.num_choices = len(choices)
        self._engine = engine
        self._on_tokens = on_tokens
        self._explain = explain
        self._decoders = [decoder for _, decoder in choices]
        self._prompts = [decoder for decoder in self._decoders if decoder.counts_prompt]
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._num_open = len(choices)
        self._is_ended = False
        self._pumps = [asyncio.create_task(self._pump(submit, decoder)) for submit, decoder in choices]
        for pump in self._pumps:
            pump.add_done_callback(self._on_pump_done)
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            error = RequestTimeout(f"The request took longer than its timeout of {timeout_s:g} s.")
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._end, error)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        await self.ready()
        if not self._events:
            raise StopAsyncIteration
        event = self._events.popleft()
        self._taken()
        return event

    async def burst(self) -> list[Event]:
        """All events that are there, at least one; none at the end. Raises what iterating raises."""
        await self.ready()
        events = list(self._events)
        self._events.clear()
        self._taken()
        return events

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def num_cached(self) -> int | None:
        """Prompt tokens that did not have to be computed; None until every prompt was begun."""
        found = [decoder.num_cached for decoder in self._prompts]
        known = [count for count in found if count is not None]
        return sum(known) if len(known) == len(found) else None

    @property
    def usages(self) -> list[Usage]:
        """The counts of each choice so far."""
        return [decoder.usage for decoder in self._decoders]

    def explanations(self) -> tuple[Explanation, ...]:
        """For each prompt, why no more of it was found; none unless the request asked. Call it at the end."""
        return self._explain([decoder.num_cached or 0 for decoder in self._prompts]) if self._explain else ()

    async def ready(self, timeout_s: float | None = None) -> bool:
        """Wait until the next event or the end is there; False if neither came in time.

        Raises what iterating would raise next. So an endpoint that asks before it sends headers can still answer with
        a proper status, and one that asks with a timeout knows when to send a sign of life.
        """
        if not self._changed.is_set():
            if timeout_s is None:
                await self._changed.wait()
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), timeout_s)
            if not self._changed.is_set():
                return False
        if not self._events and self._error is not None:
            raise self._error
        return True

    async def aclose(self) -> None:
        """Abort what still runs and drop what was not read. May be called twice."""
        self._end(None)
        self._events.clear()
        self._error = None
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, submit: Submit, decoder: ChoiceDecoder) -> None:
        """Carry one choice's outputs over. When it is to go on differently, its sequence ends and another begins."""
        name, token_ids = submit.request_id, decoder.take_continuation()
        for number in itertools.count():
            if token_ids is not None:
                submit = msgspec.structs.replace(submit, request_id=f"{name}.{number}", resume_token_ids=token_ids)
            token_ids = await self._run(submit, decoder, name=name)
            if token_ids is None:
                return

    async def _run(self, submit: Submit, decoder: ChoiceDecoder, *, name: str) -> tuple[int, ...] | None:
        """Run a sequence to its end, or to where another is to go on from the tokens returned.

        Leaving early aborts it.
        """
        async with contextlib.aclosing(self._engine.generate(submit)) as outputs:
            async for output in outputs:
                if self._on_tokens is not None:
                    self._on_tokens(name, output.token_ids)
                if output.finish not in (None, FinishReason.STOP, FinishReason.LENGTH):
                    raise self._failure(output)
                events = decoder.read(output)
                if events:
                    self._events.extend(events)
                    self._changed.set()
                if decoder.is_finished:
                    return None
                if (token_ids := decoder.take_continuation()) is not None:
                    return token_ids
        raise EngineFailure("The engine ended the request without a reason.")

    def _taken(self) -> None:
        """Events were taken: wait for more, unless there are some left or none will come."""
        if not self._events and not self._is_ended:
            self._changed.clear()

    def _on_pump_done(self, pump: asyncio.Task[None]) -> None:
        self._num_open -= 1
        error = None if pump.cancelled() else pump.exception()
        if error is not None or self._num_open == 0:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """No event comes any more: because of `error`, or because all is said."""
        self._is_ended = True
        self._error = self._error or error
        if self._timer is not None:
            self._timer.cancel()
        for pump in self._pumps:
            pump.cancel()
        self._changed.set()

    def _failure(self, output: Output) -> RequestError:
        if output.finish is FinishReason.REJECTED:
            return ServerBusy(output.message or "Too many requests are waiting; try again later.")
        is_gone = self._engine.status().state in (EngineState.FAILED, EngineState.STOPPED)
        message = output.message or "The engine failed on this request."
        return EngineFailure(message, status=503 if is_gone else 500)
