"""A conversation as the text that the model was trained on, by the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes

from vllm_mlx.chat.environment import RaisedByTemplate, make_environment
from vllm_mlx.chat.late_system import takes_late_system, with_late_system_as_user
from vllm_mlx.chat.plain_tools import calls_as_text, tool_variables, with_tools_as_text
from vllm_mlx.core.chat import Message, Tool, ToolCall
from vllm_mlx.core.errors import InvalidRequest, ModelError

_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)
_MISUSES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""What a template does to a conversation that its author did not think of."""


class ChatTemplate:
    """A chat template, compiled once."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are variables of the template, such as `bos_token`.

        Raises:
            ModelError: the template is not valid Jinja.
        """
        environment = make_environment()
        try:
            parsed = environment.parse(source)
            self._wants_parts = _wants_parts(parsed)
            self.renders_tools = "tools" in meta.find_undeclared_variables(parsed)
            """Whether it shows the model what tools there are."""
            self._renders_calls = self.renders_tools or "tool_calls" in source
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"The model's chat template is invalid, line {error.lineno}: {error.message}.") from error
        self._special_tokens = dict(special_tokens)
        self._takes_late_system = True
        self._takes_late_system = takes_late_system(lambda messages: self.render(messages, {}))

    def render(
        self,
        messages: Sequence[Message],
        template_kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] = (),
    ) -> str:
        """The conversation as text, special tokens written out: encode it without adding them again.

        A template that knows no tools gets them as text; one that knows no calls either gets
        those and their results so.

        Raises:
            InvalidRequest: the template refuses the conversation, or `template_kwargs` has a reserved name.
        """
        reserved = sorted(_RESERVED.intersection(template_kwargs))
        if reserved:
            message = f"chat_template_kwargs cannot set {reserved[0]!r}: the server fills it in."
            raise InvalidRequest(message, param="chat_template_kwargs")
        if not self._takes_late_system:
            messages = with_late_system_as_user(messages)
        if not self._renders_calls:
            messages = calls_as_text(messages)
        if tools and not self.renders_tools:
            messages = with_tools_as_text(messages, tools)
        variables = {
            **self._special_tokens,
            "tools": (tool_variables(tools) or None) if self.renders_tools else None,
            "documents": None,
            **template_kwargs,
            "messages": [self._variables_of(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except RaisedByTemplate as error:
            reason = f"The model's chat template refuses these messages: {error.message}"
            raise InvalidRequest(reason, param="messages") from error
        except (jinja2.TemplateError, *_MISUSES) as error:
            reason = f"The model's chat template cannot render these messages: {error}."
            raise InvalidRequest(reason, param="messages") from error

    def _variables_of(self, message: Message) -> dict[str, Any]:
        """A message as templates read it; absent fields are left out, since templates test for them."""
        optional = {
            "name": message.name,
            "reasoning_content": message.reasoning,
            "tool_calls": [_tool_call(call) for call in message.tool_calls] or None,
            "tool_call_id": message.tool_call_id,
        }
        present = {name: value for name, value in optional.items() if value is not None}
        return {"role": message.role, "content": self._content_of(message), **present}

    def _content_of(self, message: Message) -> str | list[dict[str, str]]:
        parts = message.content
        if self._wants_parts and parts is not None:
            texts = [parts] if isinstance(parts, str) else [part.text for part in parts]
            return [{"type": "text", "text": text} for text in texts]
        if parts is None or isinstance(parts, str):
            return parts or ""
        return "\n".join(part.text for part in parts)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call.arguments)}}


def _arguments(text: str) -> Any:
    """Templates expect an object; anything else stays the text that the model wrote."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _wants_parts(template: nodes.Template) -> bool:
    """Whether the template loops over a message's content and nowhere asks whether it is a plain string."""
    aliases = {
        assignment.target.name
        for assignment in template.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, frozenset())
    } | {"content"}
    loops = any(_is_content(loop.iter, frozenset(aliases)) for loop in template.find_all(nodes.For))
    return loops and not any(test.name == "string" for test in template.find_all(nodes.Test))


def _is_content(node: nodes.Node, aliases: frozenset[str]) -> bool:
    """Whether an expression is `x.content`, `x['content']`, or a name given to one; filters do not matter."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in aliases
