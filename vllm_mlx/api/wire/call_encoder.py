"""Tool calls of a chat answer: whole, and piece by piece in a stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from vllm_mlx.api.wire.answers import CustomAnswer, FunctionAnswer, ToolCallAnswer
from vllm_mlx.api.wire.freeform import FreeformReader
from vllm_mlx.core.chat import ToolCall
from vllm_mlx.core.events import ToolCallDelta


class CallEncoder:
    """The calls of one answer. Those of custom tools have a text instead of arguments, which carry it."""

    def __init__(self, custom_tools: Collection[str]) -> None:
        self._custom_tools = frozenset(custom_tools)
        self._called: set[int] = set()
        self._reading: dict[int, tuple[int, FreeformReader]] = {}
        """By choice: the call of a custom tool that is being written."""

    def has_called(self, choice: int) -> bool:
        """Whether a choice has had a call."""
        return choice in self._called

    def whole(self, call: ToolCall) -> ToolCallAnswer:
        """A call that is complete."""
        if call.name not in self._custom_tools:
            return ToolCallAnswer(id=call.id, type="function", function=FunctionAnswer(call.name, call.arguments))
        reader = FreeformReader()
        reader.more(call.arguments)
        reader.rest()
        return ToolCallAnswer(id=call.id, type="custom", custom=CustomAnswer(call.name, reader.text))

    def pieces(self, event: ToolCallDelta) -> Iterator[ToolCallAnswer]:
        """What to send for more of a call; the first of a call has its id and name."""
        self._called.add(event.choice)
        if event.id is not None:
            yield from self.last(event.choice)
            if event.name in self._custom_tools:
                self._reading[event.choice] = (event.index, FreeformReader())
                yield ToolCallAnswer(event.index, event.id, "custom", custom=CustomAnswer(event.name or "", ""))
            else:
                function = FunctionAnswer(event.name or "", event.arguments)
                yield ToolCallAnswer(event.index, event.id, "function", function)
                return
        if event.choice not in self._reading:
            yield ToolCallAnswer(event.index, function=FunctionAnswer(arguments=event.arguments))
        elif text := self._reading[event.choice][1].more(event.arguments):
            yield ToolCallAnswer(event.index, custom=CustomAnswer(input=text))

    def last(self, choice: int) -> Iterator[ToolCallAnswer]:
        """The rest of the text of a choice's call, which is complete."""
        index, reader = self._reading.pop(choice, (0, None))
        if reader is not None and (text := reader.rest()):
            yield ToolCallAnswer(index, custom=CustomAnswer(input=text))
