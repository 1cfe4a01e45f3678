"""Whatever a grammar of calls lets a model write, the parser of its format reads as those calls."""

from __future__ import annotations

import functools
import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from fixtures_text import write_tokenizer

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.collect import folded_calls
from vllm_mlx.chat.constrain import CallPlan, Constrainer
from vllm_mlx.chat.formats import ToolFormat, tool_format, tool_formats, with_elements
from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.plain_tools import FREEFORM_ARGUMENT, parameters_of
from vllm_mlx.chat.reasoning import reasoning_format
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import Tool, ToolCall
from vllm_mlx.core.events import ReasoningDelta, TextDelta
from vllm_mlx.core.grammar import GrammarError
from vllm_mlx.core.shape import OutputShape

pytestmark = pytest.mark.anyio
VOCAB_SIZE = 768
MAX_TOKENS = 20_000
MARKS = (
    *("<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "<arg_key>", "</arg_key>", "<arg_value>"),
    *("</arg_value>", "<tool_sep>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>", "<|function_call|>"),
    *("<|action_start|>", "<|plugin|>", "<|action_end|>", "<|START_ACTION|>", "<|END_ACTION|>", "<longcat_tool_call>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
    *("<|tool_call_argument_begin|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "｜DSML｜", "<|from|>", "<|recipient|>", "<|content|>", "<|stop|>"),
    *("<|tool_call>", "<tool_call|>", '<|"|>', "<start_function_call>", "<end_function_call>", "<escape>"),
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>"),
    *("<|tools_prefix|>", "<|tools_suffix|>", "<seed:tool_call>", "</seed:tool_call>", "<minimax:tool_call>"),
    *("</minimax:tool_call>", "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>", "<｜tool_call_begin｜>"),
    *(
        "<｜tool_call_end｜>",
        "<｜tool_sep｜>",
        "<dots_function_call>",
        "</dots_function_call>",
        "<|content_invoke_tool_json|>",
    ),
    *("<|end_message|>", "<|message_model|>", "<|tool_call_start|>", "<|tool_call_end|>", "<function=", "</function>"),
    *("<parameter=", "</parameter>"),
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "minLength": 1, "maxLength": 6},
        "unit": {"enum": ["c", "f", None]},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "more": {"$ref": "#/$defs/more"},
        "exact": {"type": "boolean"},
        "until": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
    "$defs": {
        "more": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": {"type": "string", "maxLength": 3}},
            "required": ["a"],
            "additionalProperties": False,
        }
    },
}
FUNCTIONS = (Tool("get-weather", parameters=SCHEMA, is_strict=True), Tool("stop"))
LARK = 'start: "*** Begin\\n" line{1,3} "*** End"\nline: ("+" | "-") /[a-z"\\\\]{0,6}/ "\\n"'
PATCHED = re.compile(r'\*\*\* Begin\n([+-][a-z"\\]{0,6}\n){1,3}\*\*\* End')
PATCH = Tool("apply_patch", is_freeform=True, syntax=OutputShape("grammar", LARK, "tools.0.format"))
SAY = Tool("say", is_freeform=True, syntax=OutputShape("regex", r'[a-z\n"]{1,8}', "tools.1.format"))
SYNTAXES = [(form, syntax) for form in tool_formats() for syntax in form.calls]
IDS = [form.name for form, _ in SYNTAXES]


@pytest.fixture(scope="module", params=["texts", "tokens"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Marks are spelled, or are tokens of their own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, marks=MARKS if request.param == "tokens" else ())
    return Tokenizer.load(folder)


@functools.cache
def grammars_of(tokenizer: Tokenizer) -> TokenGrammars:
    return TokenGrammars(tokenizer, vocab_size=VOCAB_SIZE)


@functools.cache
def spaces_of(tokenizer: Tokenizer) -> list[bool]:
    return [tokenizer.token_text(i).isspace() for i in range(tokenizer.vocab_size)]


@functools.cache
def constrainer_of(tokenizer: Tokenizer) -> Constrainer:
    return Constrainer(tokenizer)


def random_text(tokenizer: Tokenizer, grammar: str, seed: int) -> str:
    """A text of the grammar: every token is one of those that it allows, seldom white space, and soon the end."""
    draw, grammars = random.Random(seed), grammars_of(tokenizer)
    matcher = grammars.matcher(grammar)
    written: list[int] = []
    while len(written) < MAX_TOKENS:
        mask, _ = grammars.masks([matcher])
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist()
        ends = grammars.end_token_ids.intersection(allowed)
        if ends and (len(ends) == len(allowed) or draw.random() < 0.5):
            return tokenizer.decode(written, skip_special_tokens=False)
        others = [i for i in allowed if i not in ends]
        inky = [i for i in others if not spaces_of(tokenizer)[i]]
        written.append(draw.choice(inky if inky and draw.random() < 0.7 else others))
        matcher.advance(written[-1:])
    raise AssertionError("it does not end")


def read(form: ToolFormat, tools: tuple[Tool, ...], text: str) -> tuple[tuple[ToolCall, ...], str]:
    plain = frozenset(tool.name for tool in tools if tool.syntax is not None)
    parser = OutputParser(
        tools=ToolSet({tool.name: parameters_of(tool) for tool in tools}, plain),
        tool_format=with_elements(form) if plain else form,
    )
    events = [*parser.feed(text), *parser.finish()]
    assert not any(isinstance(event, ReasoningDelta) for event in events)
    return folded_calls(events), "".join(event.text for event in events if isinstance(event, TextDelta))


def check(tools: tuple[Tool, ...], calls: tuple[ToolCall, ...]) -> None:
    by_name = {tool.name: tool for tool in tools}
    for call in calls:
        arguments = json.loads(call.arguments)
        match call.name:
            case "apply_patch":
                assert PATCHED.fullmatch(arguments[FREEFORM_ARGUMENT])
            case "say":
                assert re.fullmatch(r'[a-z\n"]{1,8}', arguments[FREEFORM_ARGUMENT])
            case name:
                jsonschema.validate(arguments, parameters_of(by_name[name]))


@pytest.mark.parametrize(("form", "syntax"), SYNTAXES, ids=IDS)
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 30), marks=pytest.mark.slow)], ids=["few", "many"])
async def test_what_a_grammar_allows_is_read_as_calls_of_its_tools(
    tokenizer: Tokenizer, form: ToolFormat, syntax: CallSyntax, seeds: range
) -> None:
    tools = (*FUNCTIONS, PATCH, SAY)
    plan = CallPlan("required", True, None, "")
    grammar = await constrainer_of(tokenizer).with_calls(tools, syntax, plan, vocab_size=VOCAB_SIZE)
    for seed in seeds:
        text = random_text(tokenizer, grammar, seed)
        calls, rest = read(form, tools, text)
        assert calls, text
        assert not rest.strip(), text
        check(tools, calls)


HARMONY = tool_format("harmony")
THOUGHT = "<|channel|>analysis<|message|>Hm, so.<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.stop <|constrain|>json<|message|>{}"
RECIPIENT_FIRST = " to=functions.stop<|channel|>commentary <|constrain|>json<|message|>{}"
WRONG = [CALL.replace("{}", '{"a": 1}'), CALL.replace("stop", "go")]
FINAL = "<|channel|>final<|message|>yes"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("required", [CALL, THOUGHT + CALL, THOUGHT * 2 + RECIPIENT_FIRST], [FINAL, THOUGHT, THOUGHT + FINAL]),
        (
            "lazy",
            [FINAL, THOUGHT + FINAL, THOUGHT + CALL],
            WRONG,
        ),
        ("or_shape", [FINAL, RECIPIENT_FIRST, THOUGHT + FINAL], [FINAL + "!", CALL + "!"]),
        ("lazy", [FINAL], [CALL.replace(" <|constrain|>json", "").replace("{}", "x<|end|><|start|>assistant") + FINAL]),
    ],
)
async def test_calls_are_messages_in_harmony(tokenizer: Tokenizer, kind: Any, good: list[str], bad: list[str]) -> None:
    shape = OutputShape("choice", ("yes",)) if kind == "or_shape" else None
    plan = CallPlan(kind, True, reasoning_format("harmony"), "<|start|>assistant", shape)
    used = await constrainer_of(tokenizer).with_calls(FUNCTIONS, HARMONY.calls[0], plan, vocab_size=VOCAB_SIZE)

    def accepts(text: str) -> bool:
        grammars = grammars_of(tokenizer)
        matcher = grammars.matcher(used)
        try:
            matcher.advance((*tokenizer.encode(text, add_special_tokens=False), min(grammars.end_token_ids)))
        except GrammarError:
            return False
        return True

    assert [text for text in good if not accepts(text)] == []
    assert [text for text in bad if accepts(text)] == []
