"""Prompts: of the length that was asked for, and unlike each other where it matters."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.bench.prompts import BUILT_IN, NUM_OWN_WORDS, PromptSet, PromptWriter, load_set, of_mix, of_words
from vllm_mlx.core.errors import ConfigError


def text_of(conversation: Any) -> str:
    return " ".join(message["content"] for message in conversation)


def beginnings(texts: list[str]) -> set[str]:
    return {" ".join(text.split()[:NUM_OWN_WORDS]) for text in texts}


@pytest.mark.parametrize("prompts", [of_words(100), load_set("short", flag="-"), load_set("medium", flag="-")])
def test_every_prompt_begins_with_words_of_its_own(prompts: PromptSet) -> None:
    writer = PromptWriter(seed=1)
    texts = [text_of(writer.write(prompts, i, run=run)) for run in ("a", "b") for i in range(40)]
    assert len(beginnings(texts)) == 80


@pytest.mark.parametrize("prompts", [of_words(100), load_set("short", flag="-"), of_mix([(2, 50), (3, 9)])])
def test_the_same_seed_writes_the_same_prompts(prompts: PromptSet) -> None:
    def written(seed: int) -> list[str]:
        return [text_of(PromptWriter(seed).write(prompts, i, run="a")) for i in range(10)]

    assert written(1) == written(1)
    assert written(1) != written(2)


def test_shared_prefix_is_shared_but_for_the_last_words() -> None:
    writer = PromptWriter(seed=1, is_shared=True)
    texts = [text_of(writer.write(of_words(60), i, run=run)).split() for run in ("a", "b") for i in range(5)]
    assert {len(words) for words in texts} == {60}
    assert len({tuple(words[:-NUM_OWN_WORDS]) for words in texts}) == 1
    assert len({tuple(words[-NUM_OWN_WORDS:]) for words in texts}) == 10


def test_shared_prefix_of_a_set_keeps_its_texts_first() -> None:
    prompts = load_set("short", flag="-")
    text = text_of(PromptWriter(1, is_shared=True).write(prompts, 2, run="a"))
    assert text.startswith(text_of(prompts.conversations[2]))


@pytest.mark.parametrize("length", [1, 3, 100, 5000])
@pytest.mark.parametrize("is_shared", [False, True])
def test_generated_prompts_have_their_length(length: int, is_shared: bool) -> None:
    [message] = PromptWriter(1, is_shared=is_shared).write(of_words(length), 0, run="a")
    assert len(message["content"].split()) == length


def test_mix_has_all_its_lengths_in_random_order() -> None:
    prompts = of_mix([(2, 300), (30, 10)])
    lengths = [len(text_of(PromptWriter(5).write(prompts, i, run="a")).split()) for i in range(64)]
    assert prompts.size == 32
    for block in (lengths[:32], lengths[32:]):
        assert Counter(block) == {300: 2, 10: 30}
    assert lengths[:32] != sorted(lengths[:32])


def test_system_prompt_is_the_same_for_all_and_comes_first() -> None:
    writer = PromptWriter(1, system_prompt="Be brief.")
    for prompts in (of_words(20), load_set("short", flag="-")):
        first, second = (writer.write(prompts, i, run="a") for i in range(2))
        assert first[0] == second[0] == {"role": "system", "content": "Be brief."}
        assert len(beginnings([first[1]["content"], second[1]["content"]])) == 2


def test_system_prompt_joins_one_that_is_there() -> None:
    conversation = ({"role": "system", "content": "You are a cook."}, {"role": "user", "content": "Hi"})
    prompts = PromptSet("x", conversations=(conversation,))
    system, user = PromptWriter(1, system_prompt="Be brief.").write(prompts, 0, run="a")
    assert system["content"].startswith("Be brief.\n\n")
    assert system["content"].endswith("You are a cook.")
    assert user["role"] == "user"


def test_content_of_parts_gets_a_part_more() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:"}}]
    prompts = PromptSet("x", conversations=(({"role": "user", "content": parts},),))
    [before] = PromptWriter(1).write(prompts, 0, run="a")
    [after] = PromptWriter(1, is_shared=True).write(prompts, 0, run="a")
    assert [part["type"] for part in before["content"]] == ["text", "image_url"]
    assert [part["type"] for part in after["content"]] == ["image_url", "text"]


def test_built_in_sets_grow() -> None:
    def length(name: str) -> float:
        prompts = load_set(name, flag="-")
        assert prompts.name == name
        return sum(len(text_of(c).split()) for c in prompts.conversations) / prompts.size

    assert length("short") * 5 < length("medium")
    assert length("medium") * 5 < length("long")
    assert {"short", "medium", "long", "thinking"} == set(BUILT_IN)
    assert length("thinking") > 20


MESSAGE = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("value", "size"), [([MESSAGE, MESSAGE], 1), ([[MESSAGE], [MESSAGE], [MESSAGE]], 3), (["one", "two"], 2)]
)
def test_file_of_every_shape_is_read(value: Any, size: int, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(value))
    prompts = load_set(str(tmp_path / "mine.json"), flag="--prompt-file")
    assert (prompts.name, prompts.size) == ("mine", size)


@pytest.mark.parametrize("text", ["{}", "[]", "[1]", '[{"content": "no role"}]', "[[]]", "not json", '["a", {}]'])
def test_file_of_another_shape_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^--prompt-file: .*mine\.json"):
        load_set(str(tmp_path / "mine.json"), flag="--prompt-file")


def test_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--prompts: shrot is no file, and no prompt set .*short, medium"):
        load_set("shrot", flag="--prompts")
