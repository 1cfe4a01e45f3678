"""Every format over its samples, however the text is cut."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat.parsed import Parsed, parse
from vllm_mlx.chat import formats
from vllm_mlx.chat.formats import tool_format, tool_format_names, tool_formats

FILE = json.loads((Path(__file__).parents[2] / "samples" / "tool_calls.json").read_text(encoding="utf-8"))
SCHEMAS: dict[str, Any] = FILE["schemas"]
SAMPLES: list[dict[str, Any]] = FILE["samples"]
IDS = [f"{index}-{sample['format']}" for index, sample in enumerate(SAMPLES)]


def read(sample: dict[str, Any], pieces: list[str]) -> Parsed:
    return parse(pieces, tools=sample["format"], schemas=SCHEMAS)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_sample_gives_its_calls_and_its_text(sample: dict[str, Any]) -> None:
    parsed = read(sample, [sample["text"]])
    assert [list(call) for call in parsed.values] == sample["calls"]
    assert (parsed.content, parsed.reasoning) == (sample["content"], sample["reasoning"])


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_cuts_change_nothing(sample: dict[str, Any]) -> None:
    text = sample["text"]
    whole = read(sample, [text])
    assert read(sample, list(text)) == whole
    for cut in range(1, len(text), 3):
        assert read(sample, [text[:cut], text[cut:]]) == whole


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_cuts_of_random_mixtures_change_nothing(data: st.DataObject) -> None:
    first = data.draw(st.sampled_from(SAMPLES))
    others = data.draw(st.lists(st.sampled_from(SAMPLES), max_size=2))
    junk = data.draw(st.text(alphabet='<>[]{}|"\\ toolcallTOOL_CALLS:=ß', max_size=12))
    text = junk + first["text"] + junk.join(other["text"] for other in others)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(first, pieces) == read(first, [text])


@given(value=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_survives_as_a_json_argument(value: str) -> None:
    arguments = {"text": value + "</tool_call><think>{[\"'"}
    text = f"<tool_call>{json.dumps({'name': 'note', 'arguments': arguments}, ensure_ascii=False)}</tool_call>"
    assert parse(list(text), tools="hermes", schemas=SCHEMAS).values == [("note", arguments)]


def test_every_format_has_a_sample_with_several_calls_and_a_broken_one() -> None:
    for form in tool_formats():
        own = [sample for sample in SAMPLES if sample["format"] == form.name]
        assert any(len(sample["calls"]) > 1 for sample in own), form.name
        assert any(not sample["calls"] for sample in own), form.name


def test_every_module_of_the_folder_is_registered() -> None:
    folder = Path(str(formats.__file__)).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    registered = {form.name for form in tool_formats()}
    for module in modules:
        own = importlib.import_module(f"{formats.__name__}.{module}").FORMATS
        assert own
        assert {form.name for form in own} <= registered
    names = [name for form in tool_formats() for name in (form.name, *form.aliases)]
    assert sorted(names) == list(tool_format_names())
    assert len(names) == len(set(names))


KNOWN_NAMES = (
    "auto generic mistral qwen qwen3 qwen3_xml qwen3.5 qwen3_coder llama llama3 llama4 hermes nous deepseek "
    "deepseek_v3 deepseek_r1 deepseek_v4 dsml kimi kimi_k2 moonshot granite granite3 nemotron nemotron3 xlam "
    "functionary meetkai glm47 glm4 poolside_v1 harmony gpt-oss minimax minimax_m2 gemma4 step3p5 step"
)


@pytest.mark.parametrize("name", KNOWN_NAMES.split())
def test_known_name_is_accepted(name: str) -> None:
    assert name in (tool_format(name).name, *tool_format(name).aliases)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_nothing_is_a_call_without_tools(sample: dict[str, Any]) -> None:
    parsed = parse([sample["text"]], tools=sample["format"], schemas=None)
    assert parsed.calls == ()
    assert parsed.content == sample["text"]
