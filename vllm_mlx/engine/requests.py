"""The requests that callers wait for: what each asked, what it got, and whether the present engine has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from vllm_mlx.core.messages import Abort, FinishReason, Output, Submit, ToEngine

SUSPECT_DEATHS = 2
"""A request that ran in this many engines that died, without a token in between, is tried alone from then on."""
MAX_DEATHS = 3
"""One death more, and the request is given up."""


class OpenRequest:
    """One request, from the caller's first wait to its last output."""

    def __init__(self, submit: Submit) -> None:
        self._original = submit
        self._token_ids: list[int] = []
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._last: Output | None = None
        self._is_resumed = False
        self.is_submitted = False
        """Whether the present engine was given it."""
        self.is_finished = False
        self.num_deaths = 0
        """Engines in a row that died while they had it and before they gave it a token."""

    @property
    def request_id(self) -> str:
        """The caller's name for it."""
        return self._original.request_id

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what kills the engine."""
        return self.num_deaths >= SUSPECT_DEATHS

    async def next_output(self) -> Output:
        """Wait for more; after the output that carries `finish` nothing comes."""
        return await self._outputs.get()

    def submit(self) -> Submit:
        """The order for the present engine: the request with every token that the caller already has."""
        self.is_submitted = True
        resumed = (*self._original.resume_token_ids, *self._token_ids)
        return msgspec.structs.replace(self._original, resume_token_ids=resumed)

    def deliver(self, output: Output) -> None:
        """Hand an output to the caller. After a restart the caller keeps the numbers of the first start."""
        if self._is_resumed and self._last is not None:
            output = msgspec.structs.replace(output, num_cached=self._last.num_cached, queued_s=None)
        if output.finish is FinishReason.ABORT:
            message = output.message or "The engine gave up this request."
            output = msgspec.structs.replace(output, finish=FinishReason.ERROR, message=message)
        if output.token_ids:
            self._token_ids += output.token_ids
            self.num_deaths = 0
        self.is_finished = output.finish is not None
        self._last = output
        self._outputs.put_nowait(output)

    def finish(self, reason: FinishReason, message: str | None = None) -> None:
        """End it here, without the engine."""
        num_cached = self._last.num_cached if self._last else 0
        self.deliver(Output(self.request_id, finish=reason, message=message, num_cached=num_cached))

    def engine_died(self) -> None:
        """The engine is gone; it is to be submitted again."""
        if self.is_submitted:
            self.num_deaths += 1
        self.is_submitted = False
        self._is_resumed = True

    def has_all_tokens(self, max_model_len: int) -> bool:
        """Whether the length limit is reached, so that no engine has anything left to do."""
        num_output = len(self._original.resume_token_ids) + len(self._token_ids)
        if num_output == 0:
            return False
        max_tokens = self._original.sampling.max_tokens
        if max_tokens is not None and num_output >= max_tokens:
            return True
        return len(self._original.prompt) + num_output >= max_model_len


class OpenRequests:
    """All open requests of one client, across every engine that serves them. Used on the event loop only.

    Most deaths are nobody's fault, but one request may kill every engine that runs it. Those that were there twice
    without getting a token are tried one at a time: the next one starts when the one before got a token. So the
    third death names the culprit, and the others go on.
    """

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self._by_id: dict[str, OpenRequest] = {}
        self._is_engine_ready = False
        self._on_trial: OpenRequest | None = None

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def num_unsubmitted(self) -> int:
        """Requests that no engine has at the moment."""
        return sum(not request.is_submitted for request in self._by_id.values())

    def add(self, submit: Submit) -> OpenRequest:
        """Open a request; it goes to the engine now, or when there is one.

        Raises:
            ValueError: a request of this id is open.
        """
        if submit.request_id in self._by_id:
            raise ValueError(f"A request with the id {submit.request_id!r} is already open.")
        request = self._by_id[submit.request_id] = OpenRequest(submit)
        self._submit([request])
        return request

    def remove(self, request: OpenRequest) -> None:
        """The caller is gone; the engine forgets an unfinished request."""
        if request.is_finished:
            return
        request.is_finished = True
        del self._by_id[request.request_id]
        if request.is_submitted and self._is_engine_ready:
            self._send(Abort(request.request_id))
        self._end_trial(request)

    def deliver(self, outputs: Iterable[Output]) -> None:
        """Hand outputs to their callers; those of forgotten requests are dropped."""
        for output in outputs:
            request = self._by_id.get(output.request_id)
            if request is None:
                continue
            request.deliver(output)
            if request.is_finished:
                del self._by_id[output.request_id]
            if request.is_finished or output.token_ids:
                self._end_trial(request)

    def engine_ready(self) -> None:
        """An engine takes requests from now on: give it what waits."""
        self._is_engine_ready = True
        self._submit(self._by_id.values())

    def engine_died(self, max_model_len: int) -> None:
        """The engine is gone. What was complete or saw too many deaths ends here; the rest waits for the next one."""
        self._is_engine_ready = False
        self._on_trial = None
        for request in list(self._by_id.values()):
            request.engine_died()
            if request.has_all_tokens(max_model_len):
                self._finish(request, FinishReason.LENGTH)
            elif request.num_deaths >= MAX_DEATHS:
                message = f"The engine stopped {request.num_deaths} times while running this request."
                self._finish(request, FinishReason.ERROR, message)

    def finish_all(self, message: str) -> None:
        """End every open request with an error."""
        self._is_engine_ready = False
        for request in list(self._by_id.values()):
            self._finish(request, FinishReason.ERROR, message)

    def _finish(self, request: OpenRequest, reason: FinishReason, message: str | None = None) -> None:
        del self._by_id[request.request_id]
        request.finish(reason, message)

    def _submit(self, requests: Iterable[OpenRequest]) -> None:
        if not self._is_engine_ready:
            return
        for request in requests:
            if request.is_submitted or (request.is_suspect and self._on_trial):
                continue
            if request.is_suspect:
                self._on_trial = request
            self._send(request.submit())

    def _end_trial(self, request: OpenRequest) -> None:
        if request is self._on_trial:
            self._on_trial = None
            self._submit(self._by_id.values())
