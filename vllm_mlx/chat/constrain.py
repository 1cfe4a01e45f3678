"""Requests for a shape to a grammar for the engine, checked against the model's tokens before anything is computed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from vllm_mlx.chat.call_grammars import (
    CallSyntax,
    arguments_schema,
    call_rules,
    raw_input,
    raw_input_name,
    tool_grammar,
)
from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.reasoning import ReasoningFormat
from vllm_mlx.chat.shapes import ANY_TEXT, Entry, check_size, entry_of, quoted, refusal
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import Tool
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.grammar import GrammarError
from vllm_mlx.core.shape import OutputShape

MAX_REMEMBERED = 256
"""Shapes whose verdict is kept."""
_BREAK = r'("\n" | "\n\n")?'
"""What models write between reasoning and answer."""


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
        self._literal = literal_writer(tokenizer)
        self._grammars: TokenGrammars | None = None
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._known: OrderedDict[bytes, str | InvalidRequest] = OrderedDict()

    async def grammar(
        self, shape: OutputShape, *, vocab_size: int, reasoning: ReasoningFormat | None = None, tail: str = ""
    ) -> str:
        """The grammar of an answer of this shape; what comes before it, the model's reasoning, is free.

        `tail` is the end of the prompt, behind the last message: reasoning may have been opened there.

        Raises:
            InvalidRequest: the shape cannot be guaranteed; `param` names the field and, in a schema, the keyword.
        """
        check_size(shape)
        form = _key(shape, reasoning, tail)
        found = self._known.get(form)
        if found is None:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._builder, self._make, shape, vocab_size, reasoning, tail)
            self._known[form] = found
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        if isinstance(found, InvalidRequest):
            raise InvalidRequest(found.message, param=found.param, code=found.code)
        return found

    async def with_calls(self, tools: Sequence[Tool], syntax: CallSyntax, plan: CallPlan, *, vocab_size: int) -> str:
        """The grammar of an answer that has calls of these tools, checked.

        Raises:
            InvalidRequest: a tool's schema cannot be enforced; `param` names it.
        """
        inputs: list[Entry] = []
        for tool in tools:
            param = f"tools.{tool.name}.parameters"
            alone = OutputShape("json_schema", arguments_schema(tool), param, tool.is_strict)
            if (shape := raw_input(tool, syntax)) is not None:
                alone = shape
                inputs.append(_named(entry_of(alone, self._literal), raw_input_name(tool)))
            await self.grammar(alone, vocab_size=vocab_size)
        rules = call_rules(tools, syntax, literal=self._literal, is_parallel=plan.is_parallel)
        expression = {"required": "calls", "lazy": "lazy_calls", "or_shape": "(calls | @shape)"}[plan.kind]
        start = f"start: {expression}"
        if plan.reasoning is not None:
            start = after_reasoning(expression, plan.reasoning, tail=plan.tail, literal=self._literal)
        entries: list[Entry] = [{"lark_grammar": tool_grammar(start, rules)}, *inputs]
        if plan.shape is not None:
            await self.grammar(plan.shape, vocab_size=vocab_size)
            entries.append(_named(entry_of(plan.shape, self._literal), "shape"))
        whole = json.dumps({"grammars": entries})
        await self.check(whole, vocab_size=vocab_size, param="tools")
        return whole

    async def check(self, grammar: str, *, vocab_size: int, param: str = "grammar") -> None:
        """Raise InvalidRequest unless the grammar, in llguidance's own form, can be followed."""
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._builder, self._build, grammar, vocab_size)
        except GrammarError as error:
            raise InvalidRequest(f"{param} cannot be enforced: {error}", param=param) from error

    def _make(
        self, shape: OutputShape, vocab_size: int, reasoning: ReasoningFormat | None, tail: str
    ) -> str | InvalidRequest:
        """The checked grammar, or why there is none."""
        try:
            entry = entry_of(shape, self._literal)
            # Alone first: what is wrong with the shape is told in its own lines.
            alone = json.dumps({"grammars": [entry]})
            self._build(alone, vocab_size)
            if reasoning is None:
                return alone
            start = after_reasoning("@shape", reasoning, tail=tail, literal=self._literal)
            whole = json.dumps({"grammars": [{"lark_grammar": start}, _named(entry, "shape")]})
            self._build(whole, vocab_size)
        except InvalidRequest as error:
            return error
        except GrammarError as error:
            return refusal(shape, str(error))
        return whole

    def _build(self, grammar: str, vocab_size: int) -> None:
        if self._grammars is None:
            self._grammars = TokenGrammars(self._tokenizer, vocab_size=vocab_size)
        self._grammars.matcher(grammar)


def after_reasoning(rest: str, form: ReasoningFormat, *, tail: str, literal: Callable[[str], str]) -> str:
    """A Lark grammar of `rest` (a Lark expression) behind whatever the model thinks first."""
    lines = [f"TEXT: {ANY_TEXT}"]
    if form.has_channels:
        head, end = literal("<|channel|>"), literal("<|end|><|start|>assistant")
        lines.insert(0, f'start: thought* {head} "final" {literal("<|message|>")} {rest}')
        lines.append(f"thought: {head} /(analysis|commentary)[^<]{{0,64}}/ {literal('<|message|>')} TEXT {end}")
        return "\n".join(lines)
    if not form.opens or not form.closes:
        return "\n".join([f"start: {rest}"])
    closes = {mark: literal(mark) for mark in form.closes}
    ends = [f"TEXT {mark}" for mark in closes.values() if mark.startswith("<[")]
    if texts := [mark for mark, written in closes.items() if not written.startswith("<[")]:
        either = "|".join(re.escape(mark).replace("/", r"\/").replace("\n", r"\n") for mark in texts)
        lines.append(rf"until_mark[lazy]: /(.|\n)*({either})/")
        ends.append("until_mark")
    lines.append(f"thought: ({' | '.join(ends)}) {_BREAK}")
    if form.leaves_open(tail):
        lines.insert(0, f"start: thought {rest}")
    else:
        opens = " | ".join(literal(mark) for mark in form.opens)
        lines.insert(0, f"start: (({opens}) thought)? {rest}")
    return "\n".join(lines)


def literal_writer(tokenizer: Tokenizer) -> Callable[[str], str]:
    """Writes a fixed text as a Lark expression; special tokens in it, which no text can spell, are named by number."""
    pieces = {tokenizer.token_text(token): token for token in tokenizer.special_ids}
    marks = sorted(filter(None, pieces), key=len, reverse=True)
    cut = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None

    def literal(text: str) -> str:
        parts = cut.split(text) if cut is not None else [text]
        return " ".join(f"<[{pieces[part]}]>" if part in pieces else quoted(part) for part in parts if part)

    return literal


def _named(entry: Entry, name: str) -> Entry:
    return {"name": name, **entry}


def _key(shape: OutputShape, reasoning: ReasoningFormat | None, tail: str) -> bytes:
    is_open = reasoning is not None and reasoning.leaves_open(tail)
    told = repr((shape.kind, shape.value, shape.is_strict, shape.param, reasoning and reasoning.name, is_open))
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()
