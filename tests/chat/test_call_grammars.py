"""Grammars of tool calls: what they let through is what the parser of the same format reads."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from fixtures_text import write_tokenizer

from vllm_mlx.chat.call_syntax import CallSyntax, NamedArguments
from vllm_mlx.chat.collect import folded_calls
from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.enforce import Enforcer
from vllm_mlx.chat.formats import tool_format, tool_formats
from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.output_formats import OutputFormats
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.reasoning import reasoning_format
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import ChatRequest, Message, Tool, ToolChoice
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.events import TextDelta
from vllm_mlx.core.grammar import GrammarError
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape

pytestmark = pytest.mark.anyio
VOCAB_SIZE = 640
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 9}},
}
TOOLS = (Tool("weather", parameters=CITY, is_strict=True), Tool("stop"))
WEATHER = '{"name": "weather", "arguments": {"city": "Paris"}}'
TAGGED = f"<tool_call>\n{WEATHER}\n</tool_call>"
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@functools.cache
def grammars_of(tokenizer: Tokenizer) -> TokenGrammars:
    return TokenGrammars(tokenizer, vocab_size=VOCAB_SIZE)


async def grammar(
    tokenizer: Tokenizer,
    *,
    tail: str = "",
    thinks: bool = False,
    form: str = "hermes",
    template: str = "",
    knows_tools: bool = True,
    **given: Any,
) -> str | None:
    reasoning = reasoning_format("qwen3") if thinks else None
    enforcer = Enforcer(
        Constrainer(tokenizer), OutputFormats(tool_format(form), reasoning, template=template, knows_tools=knows_tools)
    )
    request = ChatRequest("r", (Message("user", "hi"),), SamplingParams(), **{"tools": TOOLS, **given})
    return (await enforcer.chat(request, vocab_size=VOCAB_SIZE, tail=tail)).grammar


def accepts(tokenizer: Tokenizer, used: str | None, text: str) -> bool:
    assert used is not None
    grammars = grammars_of(tokenizer)
    matcher = grammars.matcher(used)
    try:
        matcher.advance((*tokenizer.encode(text, add_special_tokens=False), min(grammars.end_token_ids)))
    except GrammarError:
        return False
    return True


REQUIRED = ToolChoice("required")


async def test_model_may_write_a_freeform_call_as_it_was_taught(tokenizer: Tokenizer) -> None:
    syntax = OutputShape("grammar", 'start: "ab" "\\n"', param="p")
    tools = (Tool("patch", is_freeform=True, syntax=syntax), *TOOLS)
    element = "<tool_call>\n<function=patch>\n<parameter=input>\n{}\n</parameter>\n</function>\n</tool_call>"
    in_json = '<tool_call>\n{"name": "patch", "arguments": {"input": "x"}}\n</tool_call>'
    lazy = await grammar(tokenizer, tools=tools)
    assert [accepts(tokenizer, lazy, text) for text in (element.format("ab\n"), element.format("x"), in_json)] == [
        *(True, False, True)
    ]
    assert accepts(tokenizer, lazy, f"{in_json}\n{TAGGED}")
    owed = await grammar(tokenizer, tools=tools, tool_choice=REQUIRED)
    assert accepts(tokenizer, owed, element.format("ab\n"))
    assert not accepts(tokenizer, owed, in_json)


@pytest.mark.parametrize(
    ("given", "good", "bad"),
    [
        ({"tool_choice": REQUIRED}, [TAGGED, STOP, f"{TAGGED}\n{STOP}"], ["", "hello", WEATHER, TAGGED + "x"]),
        ({"tool_choice": REQUIRED, "parallel_tool_calls": False}, [TAGGED], [f"{TAGGED}\n{STOP}"]),
        ({"tool_choice": ToolChoice("required", ("stop",))}, [STOP], [TAGGED, f"{STOP}\n{STOP}"]),
        ({"tool_choice": REQUIRED, "knows_tools": False}, [STOP, TAGGED], [f"{TAGGED}\n{STOP}"]),
        ({"tool_choice": REQUIRED}, [STOP], [STOP.replace("{}", '{"why": 1}')]),
        ({}, ["hello", f"so {TAGGED}", f"{STOP}\n{TAGGED} done"], ["<tool_call>x", TAGGED.replace("city", "town")]),
        ({"output": OutputShape("choice", ("yes", "no"))}, ["yes", TAGGED], ["hello"]),
        ({"output": OutputShape("choice", ("yes",)), "tool_choice": ToolChoice("none")}, ["yes"], [TAGGED]),
        ({"tool_choice": REQUIRED, "thinks": True}, [f"<think>hm</think>\n\n{TAGGED}", TAGGED], ["<think>hm</think>"]),
        ({"tool_choice": REQUIRED, "thinks": True, "tail": "<think>"}, [f"hm</think>{TAGGED}"], [TAGGED]),
    ],
)
async def test_answers_hold_calls_where_they_may_stand(
    tokenizer: Tokenizer, given: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    used = await grammar(tokenizer, **given)
    assert [text for text in good if not accepts(tokenizer, used, text)] == []
    assert [text for text in bad if accepts(tokenizer, used, text)] == []


def arguments_in(syntax: CallSyntax, arguments: str) -> str:
    if (named := syntax.arguments) is None:
        return arguments
    written = []
    for key, value in json.loads(arguments).items():
        before = named.before.replace("{key}", key).replace("{is_text}", str(isinstance(value, str)).lower())
        written.append(before + value_in(named, value) + named.behind)
    return named.separator.join(written)


def value_in(named: NamedArguments, value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value) if named.text is None else value.join(named.text)
    if isinstance(value, list) and named.text and all(named.text):
        return f"[{','.join(value_in(named, one) for one in value)}]"
    words = dict(zip((True, False, None), named.words, strict=True))
    return words[value] if value is None or isinstance(value, bool) else json.dumps(value)


def written(syntax: CallSyntax, *calls: tuple[str, str]) -> str:
    """Calls as the syntax has them, made from its parts."""
    each = [
        syntax.head.replace("{name}", name).replace("{index}", str(i)) + arguments_in(syntax, arguments) + syntax.end
        for i, (name, arguments) in enumerate(calls)
    ]
    return syntax.before + syntax.mark + syntax.opening + (syntax.between or "").join(each) + syntax.closing


SYNTAXES = [(form.name, syntax) for form in tool_formats() for syntax in form.calls]


@pytest.mark.parametrize(("form", "syntax"), SYNTAXES, ids=[form for form, _ in SYNTAXES])
async def test_the_parser_of_the_format_reads_what_its_grammar_allows(
    tokenizer: Tokenizer, form: str, syntax: CallSyntax
) -> None:
    calls = [("weather", '{"city": "Paris"}'), ("stop", "{}")][: 1 if syntax.between is None else 2]
    text = written(syntax, *calls)
    used = await grammar(tokenizer, form=form, template=syntax.template, tool_choice=REQUIRED)
    assert accepts(tokenizer, used, text)
    assert not accepts(tokenizer, used, text.replace("city", "town"))
    assert not accepts(tokenizer, used, text.replace("weather", "whether"))
    parser = OutputParser(tools=ToolSet({"weather": CITY, "stop": {}}), tool_format=tool_format(form))
    events = [*parser.feed(text), *parser.finish()]
    collected = folded_calls(events)
    assert [(call.name, json.loads(call.arguments)) for call in collected] == [
        (name, json.loads(arguments)) for name, arguments in calls
    ]
    assert not "".join(event.text for event in events if isinstance(event, TextDelta)).strip()


@pytest.mark.parametrize(("form", "syntax"), SYNTAXES, ids=[form for form, _ in SYNTAXES])
async def test_strict_tools_are_held_to_their_schema_once_a_call_begins(
    tokenizer: Tokenizer, form: str, syntax: CallSyntax
) -> None:
    used = await grammar(tokenizer, form=form, template=syntax.template)
    call = written(syntax, ("weather", '{"city": "Paris"}'))
    assert accepts(tokenizer, used, "just text")
    assert accepts(tokenizer, used, f"so: {call}")
    assert not accepts(tokenizer, used, f"so: {call}".replace("city", "town"))


MANY = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "name": {"type": "string", "minLength": 2, "maxLength": 4},
        "mode": {"type": "string", "enum": ["fast", "slow"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "string"}},
        "exact": {"$ref": "#/$defs/flag"},
    },
    "required": ["text", "count"],
    "$defs": {"flag": {"type": "boolean"}},
}
NAMED = [each for each in SYNTAXES if each[1].arguments is not None]


@pytest.mark.parametrize(("form", "syntax"), NAMED, ids=[form for form, _ in NAMED])
async def test_elements_have_values_of_their_schema_s_types(
    tokenizer: Tokenizer, form: str, syntax: CallSyntax
) -> None:
    tools = (Tool("run", parameters=MANY, is_strict=True),)
    used = await grammar(tokenizer, form=form, template=syntax.template, tools=tools, tool_choice=REQUIRED)
    good = [
        {"text": 'a <b> "c"\nd', "name": "a\nb", "mode": "slow", "count": 7, "tags": ["x", "y"], "exact": True},
        {"text": "x", "count": 1},
    ]
    bad: list[Any] = [{"text": "x", "name": name, "count": 1} for name in ("a", "abcde")]
    bad += [{"text": "x"}, {"text": "x", "count": 10}, {"text": "x", "mode": "mid", "count": 1}, {"count": 1}]
    for arguments in good:
        text = written(syntax, ("run", json.dumps(arguments)))
        assert accepts(tokenizer, used, text)
        parser = OutputParser(tools=ToolSet({"run": MANY}), tool_format=tool_format(form))
        [call] = folded_calls([*parser.feed(text), *parser.finish()])
        assert json.loads(call.arguments) == arguments
    for arguments in bad:
        assert not accepts(tokenizer, used, written(syntax, ("run", json.dumps(arguments))))


async def test_limits_of_texts_without_quotes_are_refused_if_strict(tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x+"}}}
    assert await grammar(tokenizer, form="qwen3_xml", tools=(Tool("f", parameters=schema),), tool_choice=REQUIRED)
    with pytest.raises(InvalidRequest) as caught:
        await grammar(tokenizer, form="qwen3_xml", tools=(Tool("f", parameters=schema, is_strict=True),))
    assert caught.value.param == "tools.f.parameters.properties.a.pattern"


PATCH = """start: "*** Begin Patch\\n" change+ "*** End Patch"
change: "+" LINE "\\n"
LINE: /[^\\n]*/
"""
PATCHED = '*** Begin Patch\n+a = "1"\n+\\b\n*** End Patch'


async def test_input_of_a_freeform_tool_follows_its_grammar(tokenizer: Tokenizer) -> None:
    tool = Tool("apply_patch", is_freeform=True, syntax=OutputShape("grammar", PATCH, "tools.0.format"))

    def call(text: str) -> str:
        return (
            f"<tool_call>\n<function=apply_patch>\n<parameter=input>\n{text}\n</parameter>\n</function>\n</tool_call>"
        )

    for choice in (REQUIRED, ToolChoice()):
        used = await grammar(tokenizer, tools=(tool, Tool("stop")), tool_choice=choice)
        assert accepts(tokenizer, used, call(PATCHED))
        assert accepts(tokenizer, used, STOP)
        assert not accepts(tokenizer, used, call("*** Begin Patch\n*** End Patch"))
    parser = OutputParser(
        tools=ToolSet({"apply_patch": {"type": "object", "properties": {"input": {"type": "string"}}}}),
        tool_format=tool_format("hermes"),
    )
    [found] = folded_calls([*parser.feed(call(PATCHED)), *parser.finish()])
    assert json.loads(found.arguments) == {"input": PATCHED}


async def test_input_of_a_freeform_tool_matches_its_expression_in_json_too(tokenizer: Tokenizer) -> None:
    tool = Tool("say", is_freeform=True, syntax=OutputShape("regex", r"[a-z]+\n\"[0-9]", "tools.0.format"))
    used = await grammar(tokenizer, form="json", tools=(tool,), tool_choice=REQUIRED)

    def call(text: str) -> str:
        return json.dumps({"name": "say", "arguments": {"input": text}})

    assert accepts(tokenizer, used, call('abc\n"7'))
    assert not accepts(tokenizer, used, call("abc"))


@pytest.mark.parametrize("syntax", [OutputShape("grammar", "start: (", "tools.0.format")])
async def test_grammar_of_a_tool_that_is_none_is_refused(tokenizer: Tokenizer, syntax: OutputShape) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await grammar(tokenizer, tools=(Tool("f", is_freeform=True, syntax=syntax),))
    assert caught.value.param == "tools.0.format"


async def test_calls_of_tools_that_are_not_strict_match_their_schemas_too(tokenizer: Tokenizer) -> None:
    weather = Tool("weather", parameters={"type": "object", "properties": {"day": {"type": "integer"}}})
    used = await grammar(tokenizer, tools=(weather, Tool("stop")))
    call = '<tool_call>\n{"name": "weather", "arguments": {"day": %s}}\n</tool_call>'
    assert accepts(tokenizer, used, "No call at all.")
    assert accepts(tokenizer, used, f"Let me see. {call % 7}")
    assert accepts(tokenizer, used, STOP)
    assert not accepts(tokenizer, used, call % '"Monday"')


async def test_calls_of_tools_that_nobody_insists_on_are_free_where_they_cannot_be_held(tokenizer: Tokenizer) -> None:
    impossible = Tool("f", parameters={"type": "object", "properties": {"x": False}, "required": ["x"]})
    assert await grammar(tokenizer, tools=(impossible,)) is None


async def test_arguments_that_may_be_null_are_an_object_all_the_same(tokenizer: Tokenizer) -> None:
    used = await grammar(
        tokenizer, tools=(Tool("weather", parameters={**CITY, "type": ["object", "null"]}),), tool_choice=REQUIRED
    )
    assert accepts(tokenizer, used, TAGGED)
    assert not accepts(tokenizer, used, '<tool_call>\n{"name": "weather", "arguments": null}\n</tool_call>')


async def test_characters_may_be_escaped_in_calls(tokenizer: Tokenizer) -> None:
    tool = Tool("say", parameters={"type": "object", "properties": {"text": {"type": "string"}}})
    used = await grammar(tokenizer, tools=(tool,))
    for text in (r"caf\u00e9", r"\ud83d\ude00", "café"):
        assert accepts(
            tokenizer, used, f'<tool_call>\n{{"name": "say", "arguments": {{"text": "{text}"}}}}\n</tool_call>'
        )


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": (Tool("f", parameters={"not": {}}, is_strict=True),)}, "tools.f.parameters.not"),
        ({"tool_choice": REQUIRED, "tools": ()}, "tool_choice"),
        ({"tool_choice": REQUIRED, "tools": (Tool("f", parameters={"type": "array"}),)}, "tools.f.parameters.type"),
        ({"tools": (Tool("f", parameters={"type": "OBJECT"}, is_strict=True),)}, "tools.f.parameters.type"),
    ],
)
async def test_what_cannot_be_guaranteed_is_refused(tokenizer: Tokenizer, given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await grammar(tokenizer, **given)
    assert caught.value.param == param
