"""Grammars of tool calls: what they let through is what the parser of the same format reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fixtures_text import write_tokenizer

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.enforce import Enforcer
from vllm_mlx.chat.formats import tool_format
from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.output_formats import OutputFormats
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.reasoning import reasoning_format
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import ChatRequest, Message, Tool, ToolChoice
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.events import ToolCallDelta
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


async def grammar(
    tokenizer: Tokenizer, *, tail: str = "", thinks: bool = False, form: str = "hermes", **given: Any
) -> str | None:
    reasoning = reasoning_format("qwen3") if thinks else None
    enforcer = Enforcer(Constrainer(tokenizer), OutputFormats(tool_format(form), reasoning))
    request = ChatRequest("r", (Message("user", "hi"),), SamplingParams(), **{"tools": TOOLS, **given})
    return (await enforcer.chat(request, vocab_size=VOCAB_SIZE, tail=tail)).grammar


def accepts(tokenizer: Tokenizer, used: str | None, text: str) -> bool:
    assert used is not None
    grammars = TokenGrammars(tokenizer, vocab_size=VOCAB_SIZE)
    matcher = grammars.matcher(used)
    try:
        matcher.advance((*tokenizer.encode(text, add_special_tokens=False), min(grammars.end_token_ids)))
    except GrammarError:
        return False
    return True


REQUIRED = ToolChoice("required")


@pytest.mark.parametrize(
    ("given", "good", "bad"),
    [
        ({"tool_choice": REQUIRED}, [TAGGED, STOP, f"{TAGGED}\n{STOP}"], ["", "hello", WEATHER, TAGGED + "x"]),
        ({"tool_choice": REQUIRED, "parallel_tool_calls": False}, [TAGGED], [f"{TAGGED}\n{STOP}"]),
        ({"tool_choice": ToolChoice("required", ("stop",))}, [STOP], [TAGGED]),
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


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", TAGGED),
        ("auto", TAGGED),
        ("llama", WEATHER.replace("arguments", "parameters")),
        ("json", WEATHER),
    ],
)
async def test_the_parser_of_the_format_reads_what_its_grammar_allows(
    tokenizer: Tokenizer, form: str, text: str
) -> None:
    used = await grammar(tokenizer, form=form, tool_choice=REQUIRED)
    assert accepts(tokenizer, used, text)
    tools = ToolSet({"weather": CITY, "stop": {}})
    parser = OutputParser(tools=tools, tool_format=tool_format(form))
    calls = [event for event in (*parser.feed(text), *parser.finish()) if isinstance(event, ToolCallDelta)]
    assert calls[0].name == "weather"
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Paris"}


async def test_tools_that_are_not_strict_leave_the_model_free(tokenizer: Tokenizer) -> None:
    assert await grammar(tokenizer, tools=(Tool("stop"),)) is None


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tool_choice": REQUIRED, "form": "glm47"}, "tool_choice"),
        ({"output": OutputShape("json_object"), "form": "glm47"}, "response_format"),
        ({"tools": (Tool("f", parameters={"not": {}}, is_strict=True),)}, "tools.f.parameters.not"),
        ({"tool_choice": REQUIRED, "tools": ()}, "tool_choice"),
    ],
)
async def test_what_cannot_be_guaranteed_is_refused(tokenizer: Tokenizer, given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await grammar(tokenizer, **given)
    assert caught.value.param == param
