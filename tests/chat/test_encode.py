"""Which tools a prompt shows."""

from __future__ import annotations

import pytest

from vllm_mlx.chat.encode import callable_tools, shown_tools
from vllm_mlx.core.chat import ChatRequest, Tool, ToolChoice
from vllm_mlx.core.sampling import SamplingParams

TOOLS = (Tool("look"), Tool("touch"))


@pytest.mark.parametrize(
    ("choice", "shown", "may_be_called"),
    [
        (ToolChoice("auto"), ["look", "touch"], ["look", "touch"]),
        (ToolChoice("none"), [], []),
        (ToolChoice("required"), ["look", "touch"], ["look", "touch"]),
        (ToolChoice("auto", ("look",)), ["look"], ["look"]),
        # a grammar keeps the model to one tool; the prompt stays as it is in the turns before and after
        (ToolChoice("required", ("look",)), ["look", "touch"], ["look"]),
    ],
)
def test_forced_call_does_not_change_the_prompt(choice: ToolChoice, shown: list[str], may_be_called: list[str]) -> None:
    request = ChatRequest("r", (), SamplingParams(), TOOLS, choice)
    assert [tool.name for tool in shown_tools(request)] == shown
    assert [tool.name for tool in callable_tools(request)] == may_be_called
