"""Requests for a shape to a grammar for the engine, checked against the model's tokens before anything is computed."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from vllm_mlx.chat.call_grammars import CallRules, arguments_schema, input_around, input_name
from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.lark import Literal as FixedText
from vllm_mlx.chat.lark import literal_writer, up_to
from vllm_mlx.chat.reasoning import ReasoningFormat
from vllm_mlx.chat.shapes import ANY_TEXT, Entry, check_size, entry_of, refusal
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import Tool
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.grammar import GrammarError
from vllm_mlx.core.kept import Kept
from vllm_mlx.core.shape import OutputShape

_BREAK = r'("\n" | "\n\n")?'
"""What models write between reasoning and answer."""
MAX_KEPT_CHARS = 16 * 1024 * 1024
"""Of all grammars together that are kept."""
MIN_CHARS = 64 * 1024
"""What each is counted as at least, so that no more than 256 are kept."""

Verdict = str | InvalidRequest
"""A grammar, or why there is none."""


class CallPlan(msgspec.Struct, frozen=True):
    """Where calls may stand in an answer."""

    kind: Literal["required", "lazy", "or_shape"]
    """Nothing but calls; any text with calls in it; calls, or the shape."""
    is_parallel: bool
    reasoning: ReasoningFormat | None
    tail: str
    """The end of the prompt, behind the last message."""
    shape: OutputShape | None = None


class Constrainer:
    """Makes and checks grammars for one model. Used on one event loop; builds on a thread of its own, one at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._fixed = literal_writer(tokenizer)
        self._grammars: TokenGrammars | None = None
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._known: Kept[bytes, Verdict] = Kept(MAX_KEPT_CHARS, weigh=_num_chars)

    async def grammar(
        self, shape: OutputShape, *, vocab_size: int, reasoning: ReasoningFormat | None = None, tail: str = ""
    ) -> str:
        """The grammar of an answer of this shape; what comes before it, the model's reasoning, is free.

        `tail` is the end of the prompt, behind the last message: reasoning may have been opened there.

        Raises:
            InvalidRequest: the shape cannot be guaranteed; `param` names the field and, in a schema, the keyword.
        """
        check_size(shape)

        def make() -> str:
            entry = entry_of(shape, self._fixed)
            # Alone first: what is wrong with the shape is told in its own lines.
            self._check(shape, entry, vocab_size)
            if reasoning is None:
                return json.dumps({"grammars": [entry]})
            start = after_reasoning("@shape", reasoning, tail=tail, fixed=self._fixed)
            return self._built([{"lark_grammar": start}, _named(entry, "shape")], vocab_size, param=shape.param)

        return await self._known_or(make, _shape_key(shape), _reasoning_key(reasoning, tail))

    async def with_calls(self, tools: Sequence[Tool], syntax: CallSyntax, plan: CallPlan, *, vocab_size: int) -> str:
        """The grammar of an answer that has calls of these tools, checked.

        Raises:
            InvalidRequest: a tool's schema cannot be enforced; `param` names it.
        """
        shapes = [_shape_of(tool, syntax) for tool in tools]
        for shape in (*shapes, *([plan.shape] if plan.shape is not None else [])):
            check_size(shape)

        def make() -> str:
            entries = self._entries(tools, syntax, plan)
            try:
                return self._built(entries, vocab_size, param="tools")
            except InvalidRequest:
                # Which of them it is: each alone.
                for shape in (*shapes, *([plan.shape] if plan.shape is not None else [])):
                    self._check(shape, entry_of(shape, self._fixed), vocab_size)
                raise

        where = (plan.kind, plan.is_parallel, _reasoning_key(plan.reasoning, plan.tail), _shape_key(plan.shape))
        return await self._known_or(make, msgspec.json.encode(tools), syntax, *where)

    async def check(self, grammar: str, *, vocab_size: int, param: str = "grammar") -> None:
        """Raise InvalidRequest unless the grammar, in llguidance's own form, can be followed."""

        def make() -> str:
            try:
                self._build(grammar, vocab_size)
            except GrammarError as error:
                raise InvalidRequest(f"{param} cannot be enforced: {error}", param=param) from error
            return grammar

        await asyncio.get_running_loop().run_in_executor(self._builder, make)

    async def _known_or(self, make: Callable[[], str], *key: object) -> str:
        """What `make` returned or refused for this key, or does now, on the thread."""

        def judge() -> Verdict:
            try:
                return make()
            except InvalidRequest as error:
                return error

        digest = hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).digest()
        found = self._known.get(digest)
        if found is None:
            found = await asyncio.get_running_loop().run_in_executor(self._builder, judge)
            self._known.add(digest, found)
        if isinstance(found, InvalidRequest):
            raise InvalidRequest(found.message, param=found.param, code=found.code)
        return found

    def _entries(self, tools: Sequence[Tool], syntax: CallSyntax, plan: CallPlan) -> list[Entry]:
        """The grammar of the answer, and those that it refers to."""
        rules = CallRules(
            tools=tools,
            syntax=syntax,
            fixed=self._fixed,
            is_parallel=plan.is_parallel,
            takes_json=plan.kind == "lazy",
        ).write()
        start = _start(plan, self._fixed, in_channel=syntax.is_message)
        inputs = [
            _named(entry_of(tool.syntax, self._fixed), input_name(tool))
            for tool in tools
            if tool.syntax is not None and input_around(tool, syntax) is not None
        ]
        shape = [] if plan.shape is None else [_named(entry_of(plan.shape, self._fixed), "shape")]
        return [{"lark_grammar": "\n".join([start, *rules])}, *inputs, *shape]

    def _built(self, entries: list[Entry], vocab_size: int, *, param: str) -> str:
        """The whole grammar. Raises InvalidRequest if it cannot be followed."""
        whole = json.dumps({"grammars": entries})
        try:
            self._build(whole, vocab_size)
        except GrammarError as error:
            raise InvalidRequest(f"{param} cannot be enforced: {error}", param=param) from error
        return whole

    def _check(self, shape: OutputShape, entry: Entry, vocab_size: int) -> None:
        """Raise InvalidRequest, with the path of the keyword, if a shape cannot be guaranteed."""
        try:
            self._build(json.dumps({"grammars": [entry]}), vocab_size)
        except GrammarError as error:
            raise refusal(shape, str(error)) from error

    def _build(self, grammar: str, vocab_size: int) -> None:
        if self._grammars is None:
            self._grammars = TokenGrammars(self._tokenizer, vocab_size=vocab_size)
        self._grammars.matcher(grammar)


def _start(plan: CallPlan, fixed: FixedText, *, in_channel: bool) -> str:
    """The rules of the whole answer, over those of calls."""
    if in_channel and plan.reasoning is not None and plan.reasoning.has_channels:
        answer = {"required": "", "lazy": "TEXT", "or_shape": "@shape"}[plan.kind]
        return after_reasoning(answer, plan.reasoning, tail=plan.tail, fixed=fixed, calls="calls")
    expression = {"required": "calls", "lazy": "lazy_calls", "or_shape": "(calls | @shape)"}[plan.kind]
    if plan.reasoning is not None:
        return after_reasoning(expression, plan.reasoning, tail=plan.tail, fixed=fixed)
    return f"start: {expression}\nTEXT: {ANY_TEXT}"


def after_reasoning(rest: str, form: ReasoningFormat, *, tail: str, fixed: FixedText, calls: str = "") -> str:
    """Rules of `rest` (a Lark expression) behind whatever the model thinks first.

    `calls`: what may stand there instead, in a channel of its own; with it, `rest` may be empty.
    """
    lines = [f"TEXT: {ANY_TEXT}"]
    if form.has_channels:
        head, end = fixed("<|channel|>"), fixed("<|end|><|start|>assistant")
        answer = f'{head} "final" {fixed("<|message|>")} {rest}' if rest else ""
        lines.insert(0, f"start: thought* ({' | '.join(filter(None, (answer, calls)))})")
        lines.append(f"thought: {head} /(analysis|commentary) ?/ {fixed('<|message|>')} said")
        return "\n".join([*lines, *up_to("said", end)])
    if not form.opens or not form.closes:
        return "\n".join([f"start: {rest}", *lines])
    ends = {f"until_mark{i}": fixed(mark) for i, mark in enumerate(form.closes)}
    lines += [rule for name, end in ends.items() for rule in up_to(name, end)]
    lines.append(f"thought: ({' | '.join(ends)}) {_BREAK}")
    opens = " | ".join(map(fixed, form.opens))
    before = "thought" if form.leaves_open(tail) else f"(({opens}) thought)?"
    return "\n".join([f"start: {before} {rest}", *lines])


def _shape_of(tool: Tool, syntax: CallSyntax) -> OutputShape:
    """What of a tool's calls the client has said."""
    if tool.syntax is not None and input_around(tool, syntax) is not None:
        return tool.syntax
    return OutputShape("json_schema", arguments_schema(tool), f"tools.{tool.name}.parameters", tool.is_strict)


def _named(entry: Entry, name: str) -> Entry:
    return {"name": name, **entry}


def _shape_key(shape: OutputShape | None) -> object:
    return shape and (shape.kind, shape.value, shape.is_strict, shape.param)


def _reasoning_key(reasoning: ReasoningFormat | None, tail: str) -> object:
    return reasoning and (reasoning.name, reasoning.leaves_open(tail))


def _num_chars(_: bytes, verdict: Verdict) -> int:
    return max(MIN_CHARS, len(verdict if isinstance(verdict, str) else verdict.message))
