"""Shapes of answers as grammars: what they let through, and how they are refused."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures_text import write_tokenizer

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.reasoning import ReasoningFormat, reasoning_format
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.grammar import GrammarError
from vllm_mlx.core.shape import OutputShape

pytestmark = pytest.mark.anyio
VOCAB_SIZE = 640
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
TAGS = {
    "triggers": ["<fn="],
    "structures": [{"begin": "<fn=add>", "schema": PERSON, "end": "</fn>"}],
}
GBNF = 'root ::= ("yes" | "no") "!"+'
LARK = 'start: "x" NUMBER\nNUMBER: /[0-9]+/'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> TokenGrammars:
    return TokenGrammars(tokenizer, vocab_size=VOCAB_SIZE)


async def accepts(
    tokenizer: Tokenizer,
    grammars: TokenGrammars,
    shape: OutputShape,
    text: str,
    *,
    reasoning: ReasoningFormat | None = None,
    tail: str = "",
) -> bool:
    """Whether the text is one that the shape allows from beginning to end."""
    grammar = await Constrainer(tokenizer).grammar(shape, vocab_size=VOCAB_SIZE, reasoning=reasoning, tail=tail)
    matcher = grammars.matcher(grammar)
    try:
        matcher.advance((*tokenizer.encode(text, add_special_tokens=False), min(grammars.end_token_ids)))
    except GrammarError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json_schema", PERSON, '{"name": "fox", "age": 3}', '{"name": 3}'),
        ("json_schema", PERSON, '{"name":"fox"}', '{"age": 1}'),
        ("json_schema", True, "[1, 2]", "fox"),
        ("json_object", None, '{"a": [true]}', "[true]"),
        ("regex", r"[a-c]+\d", "abc1", "abc"),
        ("regex", "^fox$", "fox", "^fox$"),
        ("choice", ("fox", 'a "dog"', "né\n"), 'a "dog"', "dog"),
        ("choice", ("fox", 'a "dog"', "né\n"), "né\n", "fo"),
        ("grammar", LARK, "x12", "x"),
        ("grammar", GBNF, "yes!!", "yes"),
        ("structural_tag", TAGS, 'so <fn=add>{"name": "fox"}</fn> then', "so <fn=add>fox</fn>"),
        ("structural_tag", TAGS, "no tag at all", "<fn=other>"),
    ],
)
async def test_a_shape_lets_its_own_texts_through_alone(
    tokenizer: Tokenizer, grammars: TokenGrammars, kind: Any, value: Any, good: str, bad: str
) -> None:
    assert await accepts(tokenizer, grammars, OutputShape(kind, value), good)
    assert not await accepts(tokenizer, grammars, OutputShape(kind, value), bad)


@pytest.mark.parametrize(
    ("tail", "good", "bad"),
    [
        ("<think>\n", 'the {"fox"</think>\n\n{"name": "a"}', '{"name": "a"}'),
        ("", '<think>fox</think>{"name": "a"}', 'fox</think>{"name": "a"}'),
        ("", '{"name": "a"}', "<think>fox</think>"),
        ("<think></think>", '{"name": "a"}', '<think>fox{"name": "a"}'),
    ],
)
async def test_a_shape_begins_behind_reasoning(
    tokenizer: Tokenizer, grammars: TokenGrammars, tail: str, good: str, bad: str
) -> None:
    shape, form = OutputShape("json_schema", PERSON), reasoning_format("qwen3")
    assert await accepts(tokenizer, grammars, shape, good, reasoning=form, tail=tail)
    assert not await accepts(tokenizer, grammars, shape, bad, reasoning=form, tail=tail)


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"properties": {"tags": {"type": "array", "uniqueItems": True}}}, "properties.tags.uniqueItems"),
        ({"properties": {"not": {"not": {"type": "string"}}}}, "properties.not.not"),
        ({"items": {"type": "string", "format": "zip"}}, "items.format"),
        ({"properties": {"a": {"$ref": "#/x/y"}}}, "properties.a.$ref"),
        ({"type": "string", "pattern": "(?=x)"}, "pattern"),
        ({"anyOf": [{"type": "thing"}]}, "anyOf.0.type"),
    ],
)
async def test_a_keyword_that_cannot_be_enforced_is_named_by_its_path(
    tokenizer: Tokenizer, schema: dict[str, Any], path: str
) -> None:
    shape = OutputShape("json_schema", schema, "response_format.json_schema.schema")
    with pytest.raises(InvalidRequest) as caught:
        await Constrainer(tokenizer).grammar(shape, vocab_size=VOCAB_SIZE)
    assert caught.value.param == f"response_format.json_schema.schema.{path}"


async def test_a_schema_that_is_not_strict_leaves_unknown_keywords_to_the_model(
    tokenizer: Tokenizer, grammars: TokenGrammars
) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    shape = OutputShape("json_schema", schema, is_strict=False)
    assert await accepts(tokenizer, grammars, shape, "[1, 1]")
    assert not await accepts(tokenizer, grammars, shape, '["a"]')


def _deep(levels: int) -> Any:
    schema: Any = {}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", _deep(40)),
        ("json_schema", _deep(900)),
        ("json_schema", {"enum": [f"{i:0100}" for i in range(4000)]}),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}),
        ("json_schema", False),
        ("json_schema", "fox"),
        ("regex", "a" * 20_000),
        ("regex", "(" * 5000),
        ("regex", "a(?=b)"),
        ("regex", ""),
        ("choice", ()),
        ("choice", ("a", "")),
        ("grammar", "start: " + "(" * 100_000),
        ("grammar", "root ::= " + "(" * 5000),
        ("grammar", 'root ::= "a" b'),
        ("grammar", "start: missing"),
        ("structural_tag", {"format": {"type": "tag"}}),
        ("structural_tag", {"triggers": ["<x"], "structures": [{"begin": "<y>", "schema": {}, "end": ""}]}),
    ],
)
async def test_a_shape_that_cannot_be_guaranteed_is_refused_by_its_field(
    tokenizer: Tokenizer, kind: Any, value: Any
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await Constrainer(tokenizer).grammar(OutputShape(kind, value, "field"), vocab_size=VOCAB_SIZE)
    assert (caught.value.param or "").startswith("field")
    assert len(caught.value.message) < 1000
