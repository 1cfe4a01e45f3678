"""The state machine: reasoning, when things are sent, ids, speed in counts."""

from __future__ import annotations

import json

import pytest

from tests.chat.parsed import parse
from vllm_mlx.chat.detect import Detected, detect
from vllm_mlx.chat.formats import tool_format
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet, typed
from vllm_mlx.chat.reasoning import REASONING_FORMATS, reasoning_format, reasoning_format_names
from vllm_mlx.core.events import ReasoningDelta, TextDelta, ToolCallDelta

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize("form", [form for form in REASONING_FORMATS if form.opens], ids=lambda form: form.name)
def test_marked_text_is_reasoning(form: object) -> None:
    form = reasoning_format(form.name)  # type: ignore[attr-defined]
    text = f"{form.opens[0]}Hm.{form.closes[0]}Yes."
    for pieces in ([text], list(text)):
        parsed = parse(pieces, reasoning=form.name)
        assert (parsed.reasoning, parsed.content) == ("Hm.", "Yes.")


def test_output_begins_inside_reasoning_that_the_prompt_opened() -> None:
    parsed = parse(["Hm.</thi", "nk>Yes."], reasoning="qwen3", prompt_tail="<|im_start|>assistant\n<think>\n")
    assert (parsed.reasoning, parsed.content) == ("Hm.", "Yes.")


def test_answer_of_a_model_that_does_not_think_is_never_reasoning() -> None:
    parser = OutputParser(reasoning=reasoning_format("qwen3"), prompt_tail="<think>\n\n</think>\n\n")
    assert parser.feed("Hello") == [TextDelta(0, "Hello")]
    assert parse(["Hello world."], reasoning="qwen3", prompt_tail=None).content == "Hello world."


def test_unknown_beginning_is_settled_by_the_closing_mark() -> None:
    parsed = parse(list("Hm.</think>Yes."), reasoning="qwen3", prompt_tail=None)
    assert (parsed.reasoning, parsed.content) == ("Hm.", "Yes.")


def test_mark_inside_the_answer_is_text() -> None:
    text = "Write <think> and </think> around it."
    assert parse([text], reasoning="qwen3").content == text


def test_call_inside_reasoning_is_a_call() -> None:
    parsed = parse(list(f"<think>Now.{CALL}</think>Done."), reasoning="qwen3", tools="hermes", schemas={})
    assert (parsed.reasoning, parsed.content, parsed.values) == ("Now.", "Done.", [("f", {"a": 1})])


def test_tool_section_ends_reasoning_that_was_not_closed() -> None:
    text = "<think>Now.<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}"
    parsed = parse([text], reasoning="kimi_k2", tools="kimi", schemas={})
    assert (parsed.reasoning, parsed.calls, parsed.ids) == ("Now.", (("f", "{}"),), ("functions.f:0",))


def test_channels_are_told_apart() -> None:
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    parsed = parse(list(text), reasoning="harmony")
    assert (parsed.reasoning, parsed.content) == ("Hm.", "Yes.")


def test_name_is_sent_before_the_arguments_are_complete() -> None:
    parser = OutputParser(tools=ToolSet(), tool_format=tool_format("hermes"), prompt_tail="")
    events = parser.feed('<tool_call>{"name": "f", "arguments": {"text": "abc')
    assert [event.name for event in events if isinstance(event, ToolCallDelta)] == ["f", None]
    assert events[-1] == ToolCallDelta(0, 0, arguments='{"text": "abc')
    assert parser.feed("def") == [ToolCallDelta(0, 0, arguments="def")]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {\n  \n', "{\n  \n"),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1', '{"a": 1'),
        ('{"name": "f", "parameters": {', "{"),
    ],
)
def test_a_call_that_is_cut_off_in_its_arguments_is_a_call(text: str, arguments: str) -> None:
    for pieces in ([text], list(text)):
        parsed = parse(pieces, tools="auto", schemas={"f": {"type": "object"}})
        assert (parsed.content, parsed.calls) == ("", (("f", arguments),))


def test_text_is_held_only_while_it_may_become_a_mark() -> None:
    parser = OutputParser(tools=ToolSet(), tool_format=tool_format("hermes"), prompt_tail="")
    assert parser.feed("a <tool") == [TextDelta(0, "a ")]
    assert parser.feed("box") == [TextDelta(0, "<toolbox")]


def test_text_after_a_call_is_kept() -> None:
    assert parse([f"Before. {CALL} After."], tools="hermes", schemas={}).content == "Before.  After."


def test_ids_differ_between_calls_and_requests_and_repeat_for_the_same() -> None:
    def ids(salt: str, name: str) -> list[str | None]:
        parser = OutputParser(tools=ToolSet(), tool_format=tool_format(name), prompt_tail="", salt=salt)
        events = [*parser.feed("[TOOL_CALLS]f{}[TOOL_CALLS]f{}"), *parser.finish()]
        return [event.id for event in events if isinstance(event, ToolCallDelta) and event.name]

    assert ids("a", "mistral") == ids("a", "mistral")
    assert len({*ids("a", "mistral"), *ids("b", "mistral")}) == 4
    assert all(call_id and len(call_id) == 9 and call_id.isalnum() for call_id in ids("a", "mistral"))


def test_slips_in_json_are_mended() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "x\n\\d\\\'", "b": [1, ], }}</tool_call>'
    for pieces in ([text], list(text)):
        assert parse(pieces, tools="hermes", schemas={}).values == [("f", {"a": "x\n\\d'", "b": [1]})]


@pytest.mark.parametrize("behind", ["\n</tool_call>", "\n</tool_call>\n<tool_call>"])
def test_mark_that_the_end_cuts_off_behind_a_call_is_no_text(behind: str) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}'
    for end in range(len(behind) + 1):
        text = call + behind[:end]
        for pieces in ([text], list(text)):
            parsed = parse(pieces, tools="hermes", schemas={})
            assert (parsed.content, parsed.values) == ("", [("f", {"a": 1})])
    assert parse([f"{CALL}\n<b>x"], tools="hermes", schemas={}).content == "\n<b>x"


@pytest.mark.parametrize(
    ("escapes", "text"),
    [
        (r"\ud83c\uDF89", "🎉"),
        (r"\ud83c", "\ufffd"),
        (r"\udf89", "\ufffd"),
        (r"\ud83c\n", "\ufffd\n"),
        (r"\ud83c\ud83c\udf89x", "\ufffd🎉x"),
        (r"\ud83c\u00e9", "\ufffdé"),
        (r"\\ud83c", r"\ud83c"),
    ],
)
def test_half_a_character_becomes_the_replacement_character(escapes: str, text: str) -> None:
    """Parsers of clients refuse a JSON text with half of a surrogate pair, and no answer can carry its value."""
    inside = json.dumps(f'{{"a": "{escapes}"}}')
    for call in (f'{{"a": "{escapes}"}}', inside):
        whole = f'<tool_call>{{"name": "f", "arguments": {call}}}</tool_call>'
        for pieces in ([whole], list(whole)):
            assert parse(pieces, tools="hermes", schemas={}).values == [("f", {"a": text})]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("pythonic", r'[f(a="\ud83c")]'),
        ("hermes", r'<tool_call>{"name": "f\udf89", "arguments": {"a": 1}}</tool_call>'),
        ("qwen3_xml", r'<tool_call><function=f><parameter=a>["\ud83c"]</parameter></function></tool_call>'),
    ],
)
def test_no_call_has_half_a_character(name: str, call: str) -> None:
    parsed = parse([call], tools=name, schemas={"f": {"properties": {"a": {"type": "array"}}}})
    assert parsed.calls
    assert all((f"{name}{arguments}").encode() for name, arguments in parsed.calls)


def test_arguments_inside_a_text_must_be_json() -> None:
    call = '<tool_call>{"name": "f", "arguments": "{\\"a\\": NaN}"}</tool_call>'
    assert parse([call], tools="hermes", schemas={}).content == call


def test_long_output_is_read_once() -> None:
    """A value of a megabyte in small pieces; rereading what was held would take minutes."""
    value = "x < y </b " * 100_000
    for text, name in (
        (json.dumps({"name": "f", "arguments": {"a": value}}), "hermes"),
        (f"<function=f>\n<parameter=a>{value}</parameter></function>", "qwen3_xml"),
    ):
        whole = f"<tool_call>{text}</tool_call>"
        pieces = [whole[at : at + 40] for at in range(0, len(whole), 40)]
        assert parse(pieces, tools=name, schemas={}).values == [("f", {"a": value})]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("3", {"type": "integer"}, 3),
        ("3", {"type": "string"}, "3"),
        ("3.0", {"type": "number"}, 3),
        ("abc", {"type": "integer"}, "abc"),
        ("True", {"type": "boolean"}, True),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("{'a': (1, None)}", {"type": "object"}, {"a": [1, None]}),
        ("[1]", {"anyOf": [{"type": "array"}, {"type": "string"}]}, [1]),
        ("[1]", None, "[1]"),
        ("7", {"enum": [7, 8]}, 7),
    ],
)
def test_untyped_text_takes_the_type_of_the_schema(text: str, schema: dict[str, object] | None, value: object) -> None:
    assert typed(text, schema) == value
    assert type(typed(text, schema)) is type(value)


def test_formats_are_told_from_the_template() -> None:
    assert detect("... <tool_call> ... </think>", "qwen3") == Detected("hermes", "qwen3")
    assert detect("<tool_call>\n<function=x>", "qwen3_moe") == Detected("qwen3_xml", None)
    assert detect("<tool_call>{{ name }}<arg_key> </think>", "glm4_moe") == Detected("glm47", "qwen3")
    assert detect("<|channel|>analysis", "gpt_oss") == Detected("harmony", "harmony")
    assert detect("nothing", "gpt2") == Detected(None, None)


def test_reasoning_names_are_unique() -> None:
    assert len(set(reasoning_format_names())) == len(reasoning_format_names())
    assert {"qwen3", "deepseek_r1", "deepseek_v4", "glm4", "mistral", "step3p5", "gemma4", "gpt_oss", "harmony"} <= set(
        reasoning_format_names()
    )


def test_reasoning_arrives_as_it_is_written() -> None:
    parser = OutputParser(reasoning=reasoning_format("qwen3"), prompt_tail="<think>")
    assert parser.feed("Hm") == [ReasoningDelta(0, "Hm")]


def test_many_payloads_that_the_end_cuts_off_are_not_each_read_to_the_end() -> None:
    text = "<function=f>\n<parameter=a>" * 4000
    assert parse([text], tools="qwen3_xml", schemas={}).content == text


def test_after_very_many_payloads_that_are_no_calls_none_is_tried() -> None:
    text = "<tool_call>{x} " * 1_500
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse([text, call], tools="hermes", schemas={"f": {}}).calls == ()
    assert parse([text[: len(text) // 2], call], tools="hermes", schemas={"f": {}}).calls == (("f", "{}"),)


def test_bare_object_must_begin_as_calls_do() -> None:
    good = ['{"name": "f", "arguments": {}}', '{"type": "function", "name": "f", "parameters": {}}']
    bad = '{"weather": 1, "name": "f", "arguments": {}}'
    for whole in (lambda text: [text], list):
        assert all(parse(whole(text), tools="llama", schemas={"f": {}}).calls for text in good)
        found = parse(whole(bad), tools="llama", schemas={"f": {}})
        assert (found.calls, found.content) == ((), bad)
