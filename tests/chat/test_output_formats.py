"""Which formats a model gets, and special tokens that are marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat.conftest import byte_level_backend
from tests.chat.parsed import Parsed, fold
from vllm_mlx.chat.choice import ChoiceDecoder, Reading
from vllm_mlx.chat.formats import tool_format_names
from vllm_mlx.chat.output_formats import OutputFormats, output_formats
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.reasoning import reasoning_format_names
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError
from vllm_mlx.core.events import Event, Finish, ReasoningDelta, TextDelta
from vllm_mlx.core.messages import FinishReason, Output
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import TokenLogprobs

HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>", "<|pad|>")
MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[INST]")


def make(
    folder: Path, *, template: str = "", model_type: str = "", special: tuple[str, ...] = (), eos: str = "<|im_end|>"
) -> Tokenizer:
    backend = byte_level_backend()
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "chat_template": template}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return Tokenizer.load(folder)


def names(found: OutputFormats) -> tuple[str | None, str | None]:
    return found.tools and found.tools.name, found.reasoning and found.reasoning.name


def choose(tokenizer: Tokenizer, *, renders_tools: bool = True, **settings: Any) -> OutputFormats:
    return output_formats(tokenizer, config=Config(**settings), renders_tools=renders_tools)


def read(tokenizer: Tokenizer, formats: OutputFormats, text: str, *, tail: str = "") -> Parsed:
    """What a client gets of a text that the model wrote token by token."""
    parser = OutputParser(
        tools=ToolSet(), tool_format=formats.tools, reasoning=formats.reasoning, prompt_tail=tail, salt="r"
    )
    sampling = SamplingParams()
    decoder = ChoiceDecoder(tokenizer, choice=0, prompt_ids=(5,), sampling=sampling, reading=Reading(parser, formats))
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    events = [event for token_id in token_ids for event in decoder.read(Output("r", (token_id,)))]
    return fold([*events, *decoder.read(Output("r", (), finish=FinishReason.LENGTH))])


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, OutputFormats]:
    """A model that thinks and calls tools as Qwen's do."""
    tokenizer = make(tmp_path_factory.mktemp("thinker"), template="{{ tools }}<tool_call></think>")
    return tokenizer, choose(tokenizer)


def test_formats_are_told_from_the_template(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, template="{{ tools }}<tool_call></think>")
    assert names(choose(tokenizer)) == ("hermes", "qwen3")


def test_formats_are_told_from_the_type_if_the_template_shows_none(tmp_path: Path) -> None:
    assert names(choose(make(tmp_path, template="{{ tools }}", model_type="gpt_oss"))) == ("harmony", "harmony")


def test_unknown_way_to_show_tools_gets_the_format_that_knows_all_marks(tmp_path: Path) -> None:
    assert names(choose(make(tmp_path, template="{{ tools }}"))) == ("auto", None)


def test_template_without_tools_gets_what_the_text_asks_for(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, template="[TOOL_CALLS]", special=MISTRAL)
    assert names(choose(tokenizer, renders_tools=False)) == ("hermes", None)


def test_operator_decides(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, template="{{ tools }}<tool_call></think>")
    assert names(choose(tokenizer, tool_call_parser="none", reasoning_parser="none")) == (None, None)
    assert names(choose(tokenizer, tool_call_parser="mistral", reasoning_parser="Seed_OSS")) == ("mistral", "seed_oss")


def test_every_name_and_alias_is_taken(tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    for name in tool_format_names():
        assert choose(tokenizer, tool_call_parser=name).tools is not None
    for name in reasoning_format_names():
        assert choose(tokenizer, reasoning_parser=name).reasoning is not None


@pytest.mark.parametrize("field", ["tool_call_parser", "reasoning_parser"])
def test_unknown_name_is_refused_with_its_flag(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(make(tmp_path), **{field: "mistrall"})
    assert caught.value.message.startswith("--" + field.replace("_", "-"))
    assert "mistral" in caught.value.message


def test_special_tokens_that_are_marks_reach_the_parser(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, template="{{ tools }}[TOOL_CALLS]", special=MISTRAL)
    found = read(tokenizer, choose(tokenizer), 'I look.[TOOL_CALLS]weather[ARGS]{"city": "Rome"}')
    assert found.values == [("weather", {"city": "Rome"})]
    assert found.content == "I look."


def test_channels_are_read_from_special_tokens(tmp_path: Path) -> None:
    template = "{{ tools }}<|channel|>analysis<|start|>"
    tokenizer = make(tmp_path, template=template, model_type="gpt_oss", special=HARMONY, eos="<|return|>")
    text = (
        "<|channel|>analysis<|message|>Let me see.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"a": 1}<|call|>'
        "<|start|>assistant<|channel|>final<|message|>Rain.<|return|>"
    )
    found = read(tokenizer, choose(tokenizer), text, tail="<|start|>assistant")
    assert (found.reasoning, found.content) == ("Let me see.", "Rain.")
    assert found.values == [("weather", {"a": 1})]


def test_special_tokens_that_are_no_marks_are_not_shown(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, template="{{ tools }}[TOOL_CALLS]</think>", special=MISTRAL)
    found = read(tokenizer, choose(tokenizer), "a[INST]b<|im_start|>c<|im_end|>d</think>e[INST]", tail="<think>")
    assert (found.reasoning, found.content) == ("abcd", "e")


TEXT = (
    "Let me see, naïve 東京.</think>\n\nI look <b>it</b> up.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "STOP </tool_call> {é}"}}\n</tool_call>\nDone, ST.'
)


@given(width=st.integers(1, 9), interval=st.integers(1, 5), has_logprobs=st.booleans())
@settings(max_examples=40, deadline=None)
def test_events_are_the_same_however_tokens_arrive(
    thinker: tuple[Tokenizer, OutputFormats], width: int, interval: int, has_logprobs: bool
) -> None:
    tokenizer, formats = thinker
    parser = OutputParser(
        tools=ToolSet(), tool_format=formats.tools, reasoning=formats.reasoning, prompt_tail="<think>\n", salt="r"
    )
    decoder = ChoiceDecoder(
        tokenizer,
        choice=0,
        prompt_ids=(5,),
        sampling=SamplingParams(stop=("STOP",)),
        stream_interval=interval,
        reading=Reading(parser, formats),
    )
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    events: list[Event] = []
    for start in range(0, len(token_ids), width):
        piece = token_ids[start : start + width]
        logprobs = tuple(TokenLogprobs(0.0, (), ()) for _ in piece) if has_logprobs else None
        events += decoder.read(Output("r", piece, logprobs=logprobs))
    events += decoder.read(Output("r", (2,), finish=FinishReason.STOP))
    found = fold(events)
    assert found.reasoning == "Let me see, naïve 東京."
    assert found.values == [("weather", {"city": "STOP </tool_call> {é}"})]
    assert found.content.split() == ["I", "look", "<b>it</b>", "up.", "Done,", "ST."]
    end = events[-1]
    assert isinstance(end, Finish)
    assert end.stop_string is None
    assert end.usage.completion_tokens == len(token_ids) + 1
    think_ids = tokenizer.encode(TEXT.split("\n\n", maxsplit=1)[0], add_special_tokens=False)
    assert abs(end.usage.reasoning_tokens - len(think_ids)) <= 1
    tokens = [info for event in events if isinstance(event, TextDelta | ReasoningDelta) for info in event.tokens]
    written = b"".join(info.bytes for info in tokens)
    assert written == (TEXT.encode() if has_logprobs else b"")
