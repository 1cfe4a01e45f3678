"""Chat templates: the dialect, the messages as templates read them, and errors that blame the right field."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from vllm_mlx.chat.render import ChatTemplate
from vllm_mlx.core.chat import Message, TextPart, ToolCall
from vllm_mlx.core.errors import InvalidRequest, ModelError

CHATML = """
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\n' + 'You help.' + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {%- generation %}{{ message.content }}{% endgeneration %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """
{{- bos_token }}
{%- if tools is not none and tools %}{{ raise_exception('no tools here') }}{% endif %}
{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
MISTRAL = """
{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ message['content'] + eos_token}}
    {% endif %}
{% endfor %}
"""
TURNS = (
    Message("user", "Who, <me> & 'you'?"),
    Message("assistant", " I am\n"),
    Message("user", "東京 😀"),
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, *messages: Message, **kwargs: Any) -> str:
    return ChatTemplate(source, special_tokens=SPECIAL).render(messages, kwargs)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL], ids=["chatml", "llama3", "mistral"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_is_that_of_transformers(source: str, add_generation_prompt: bool) -> None:
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    conversation = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    expected, _ = theirs(
        [conversation],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
        **SPECIAL,
    )
    template = ChatTemplate(source, special_tokens=SPECIAL)
    kwargs = {"enable_thinking": False}
    assert template.render(TURNS, kwargs, add_generation_prompt=add_generation_prompt) == expected[0]


def test_tool_calls_have_their_arguments_as_an_object() -> None:
    calls = (ToolCall("1", "find", '{"city": "Köln", "n": 2}'), ToolCall("2", "say", "not json"))
    text = render("{{ messages[0].tool_calls | tojson }}", Message("assistant", None, tool_calls=calls))
    assert text == (
        '[{"id": "1", "type": "function", "function": {"name": "find", "arguments": {"city": "Köln", "n": 2}}}, '
        '{"id": "2", "type": "function", "function": {"name": "say", "arguments": "not json"}}]'
    )


def test_fields_that_a_message_lacks_are_undefined() -> None:
    source = "{% if tools %}{% endif %}{% for m in messages %}{{ m.keys() | list | join(',') }};{% endfor %}"
    tool = Message("tool", "4", name="add", tool_call_id="1")
    assert render(source, Message("user", "a"), Message("assistant", None, reasoning="b"), tool) == (
        "role,content;role,content,reasoning_content;role,content,name,tool_call_id;"
    )


def test_absent_content_is_empty() -> None:
    assert render("[{{ messages[0].content }}]", Message("assistant")) == "[]"


PARTS = Message("user", (TextPart("one"), TextPart("two")))
LOOP = "{% for part in CONTENT %}<{{ part.text }}>{% endfor %}"
MACRO = (
    "{% macro show(content) %}" + LOOP.replace("CONTENT", "content") + "{% endmacro %}{{ show(messages[0].content) }}"
)
EITHER = "{% if messages[0].content is string %}{{ messages[0].content }}{% else %}" + LOOP + "{% endif %}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content }}", "one\ntwo"),
        (LOOP.replace("CONTENT", "messages[0].content"), "<one><two>"),
        (LOOP.replace("CONTENT", "messages[0]['content'] | selectattr('type', 'eq', 'text')"), "<one><two>"),
        ("{% set parts = messages[0].content %}" + LOOP.replace("CONTENT", "parts"), "<one><two>"),
        (MACRO, "<one><two>"),
        (EITHER.replace("CONTENT", "messages[0].content"), "one\ntwo"),
    ],
)
def test_content_has_the_form_that_the_template_reads(source: str, expected: str) -> None:
    assert render(source, PARTS) == expected


def test_plain_content_becomes_a_part_where_only_parts_are_read() -> None:
    source = "{% for part in messages[0].content %}<{{ part.type }}:{{ part.text }}>{% endfor %}"
    assert render(source, Message("user", "hi")) == "<text:hi>"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True) }}", '{"a": 1, "b": "\\u00e9"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{% for i in [0, 1, 2] %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for i in [0, 1, 2] %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "0"),
        ("{% if true %}\n    a\n{% endif %}\nb", "    a\nb"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{% set ns = namespace(a=1, b=2) %}{% set ns.a = 3 %}{{ ns.a + ns.b }}", "5"),
    ],
)
def test_dialect(source: str, expected: str) -> None:
    assert render(source, Message("user", "x")) == expected


def test_kwargs_reach_the_template() -> None:
    assert render(CHATML, TURNS[0], enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert render(CHATML, TURNS[0]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_reserved_kwargs_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        ChatTemplate(CHATML, special_tokens=SPECIAL).render(TURNS, {name: []})
    assert caught.value.param == "chat_template_kwargs"


def test_refusal_of_the_template_is_the_answer() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render(MISTRAL, TURNS[0], TURNS[2])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].content }}",
        "{{ nothing.at.all }}",
        "{{ messages[0].content.nothing() }}",
        "{{ 1 / 0 }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
    ],
)
def test_failing_or_unsafe_template_is_a_clear_refusal(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template cannot render") as caught:
        render(source, TURNS[0])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | no_such_filter }}", "{% generation %}"])
def test_invalid_template_is_the_models_fault(source: str) -> None:
    with pytest.raises(ModelError, match="chat template is invalid, line 1"):
        ChatTemplate(source, special_tokens={})


def test_one_template_serves_many_threads() -> None:
    template = ChatTemplate(CHATML, special_tokens=SPECIAL)
    texts: list[str] = []
    messages = [[Message("user", str(number))] for number in range(8)]
    threads = [threading.Thread(target=lambda m=m: texts.append(template.render(m, {}))) for m in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(template.render(m, {}) for m in messages)
