"""Vocabularies from model folders: ids, exact bytes, special tokens, and clear errors for broken files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.errors import ModelError

MakeFolder = Callable[..., Path]
TEXTS = ["Paris", " Paris", "a  b", "😀", "naïve\n\n東京", "<tool_call>x", ""]


@given(text=st.text())
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(byte_level: Tokenizer, text: str) -> None:
    token_ids = byte_level.encode(text, add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, token_ids)) == text.encode()


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁")))
def test_decode_gives_the_encoded_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_decode_agrees_with_the_library(
    kind: str, text: str, backends: dict[str, tokenizers.Tokenizer], request: pytest.FixtureRequest
) -> None:
    tokenizer, backend = request.getfixturevalue(kind), backends[kind]
    token_ids = backend.encode(text).ids
    assert tokenizer.encode(text, add_special_tokens=True) == tuple(token_ids)
    assert tokenizer.decode(token_ids) == backend.decode(token_ids)


def test_byte_fallback_tokens_are_single_bytes(sentencepiece: Tokenizer) -> None:
    token_ids = sentencepiece.encode("é", add_special_tokens=False)
    assert [sentencepiece.token_bytes(i) for i in token_ids] == [b" ", b"\xc3", b"\xa9"]
    assert sentencepiece.token_text(token_ids[1]) == "\ufffd"


def test_unknown_id_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == b""


def test_special_tokens_are_skipped_and_added_text_is_not(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("<|im_start|>a<tool_call>b<|im_end|>", add_special_tokens=False)
    assert byte_level.decode(token_ids) == "a<tool_call>b"
    assert byte_level.decode(token_ids, skip_special_tokens=False) == "<|im_start|>a<tool_call>b<|im_end|>"


@pytest.mark.parametrize(
    ("decoder", "pieces"),
    [
        (decoders.WordPiece(), ["a", "hello", "##s", ",", "world"]),
        (decoders.Metaspace(), ["▁a", "▁hello", "s", ",", "▁world"]),
        (decoders.Metaspace(prepend_scheme="never"), ["a", "▁hello", "s", ",", "▁world"]),
        (None, ["a", "hello", "s", ",", "world"]),
    ],
)
def test_other_decoders_are_followed(
    decoder: decoders.Decoder | None, pieces: list[str], make_folder: MakeFolder
) -> None:
    backend = tokenizers.Tokenizer(
        models.WordLevel({**{p: i for i, p in enumerate(pieces)}, "[U]": 9}, unk_token="[U]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = Tokenizer.load(make_folder(backend))
    assert tokenizer.decode(range(5)) == backend.decode(list(range(5)))


def test_sizes(byte_level: Tokenizer) -> None:
    assert byte_level.vocab_size == byte_level.token_id("<tool_call>") + 1
    assert byte_level.max_token_bytes == max(len(byte_level.token_bytes(i)) for i in range(byte_level.vocab_size)) > 4


def test_end_tokens_come_from_every_file(make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]) -> None:
    folder = make_folder(
        backends["byte_level"],
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}},
        generation_config={"eos_token_id": [0, 2]},
        config={"text_config": {"eos_token_id": 7}},
    )
    assert Tokenizer.load(folder).eos_token_ids == {0, 2, 7}


def test_special_tokens_map_fills_in(make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]) -> None:
    folder = make_folder(
        backends["byte_level"],
        tokenizer_config={"eos_token": "<|im_end|>", "extra_special_tokens": {"image_token": "<tool_call>"}},
        special_tokens_map={"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"},
    )
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.special_tokens["image_token"] == "<tool_call>"
    assert tokenizer.token_id("<tool_call>") in tokenizer.special_ids


@pytest.mark.parametrize(("flags", "expected"), [({}, 1), ({"add_bos_token": False}, 0), ({"add_bos_token": True}, 1)])
def test_explicit_bos_rule_wins(
    flags: dict[str, bool], expected: int, make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    folder = make_folder(backends["sentencepiece"], tokenizer_config={"bos_token": "<s>", **flags})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a", add_special_tokens=True).count(1) == expected
    assert 1 not in tokenizer.encode("a", add_special_tokens=False)


def test_tokens_of_the_configuration_are_added(
    make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    size = backends["byte_level"].get_vocab_size()
    added = {
        str(size): {"content": "<think>", "special": False},
        str(size + 1): {"content": "<|eot|>", "special": True},
    }
    folder = make_folder(backends["byte_level"], tokenizer_config={"added_tokens_decoder": added})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<think><|eot|>", add_special_tokens=False) == (size, size + 1)
    assert tokenizer.decode((size, size + 1)) == "<think>"


def test_token_that_cannot_have_its_id_is_refused(
    make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    folder = make_folder(
        backends["byte_level"], tokenizer_config={"added_tokens_decoder": {"5": {"content": "<think>"}}}
    )
    with pytest.raises(ModelError, match=r"<think>.* 5"):
        Tokenizer.load(folder)


def test_recommended_sampling(make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "max_new_tokens": 5}
    folder = make_folder(backends["byte_level"], generation_config=generation)
    assert Tokenizer.load(folder).generation_defaults == {"temperature": 0.6, "top_k": 20}
    make_folder(generation_config={**generation, "do_sample": False})
    assert Tokenizer.load(folder).generation_defaults == {}


def test_length_limit_is_the_smallest_known(make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]) -> None:
    huge = 1000000000000000019884624838656
    folder = make_folder(backends["byte_level"], tokenizer_config={"model_max_length": huge})
    assert Tokenizer.load(folder).max_length is None
    make_folder(config={"text_config": {"max_position_embeddings": 4096}})
    assert Tokenizer.load(folder).max_length == 4096


def test_stored_truncation_and_padding_are_dropped(
    make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    backend = tokenizers.Tokenizer.from_str(backends["byte_level"].to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.load(make_folder(backend))
    assert tokenizer.decode(tokenizer.encode("a b c d", add_special_tokens=True)) == "a b c d"
    assert len(tokenizer.encode("a", add_special_tokens=True)) == 1


@pytest.mark.parametrize(
    ("stem", "content"),
    [
        ("tokenizer", "{"),
        ("tokenizer", {"model": {"type": "Nonsense"}}),
        ("tokenizer_config", "{"),
        ("tokenizer_config", [1]),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"5": "a"}}),
        ("tokenizer_config", {"chat_template": 5}),
        ("tokenizer_config", {"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}),
        ("special_tokens_map", "nul"),
        ("generation_config", {"eos_token_id": "2"}),
        ("generation_config", {"temperature": "hot"}),
        ("generation_config", {"top_p": 1.5}),
        ("config", {"eos_token_id": [1, None]}),
    ],
)
def test_malformed_file_is_named(
    stem: str, content: Any, make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    folder = make_folder(backends["byte_level"])
    make_folder(**{stem: content})
    with pytest.raises(ModelError, match=f"{stem}.json"):
        Tokenizer.load(folder)


def test_chat_template_sources_in_order(make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = make_folder(backends["byte_level"])
    assert Tokenizer.load(folder).chat_template is None
    make_folder(tokenizer_config={"chat_template": named})
    assert Tokenizer.load(folder).chat_template == "D"
    make_folder(chat_template={"chat_template": "J"})
    assert Tokenizer.load(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("F", encoding="utf-8")
    assert Tokenizer.load(folder).chat_template == "F"


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


def test_other_vocabulary_files_are_converted(
    make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    pytest.importorskip("transformers")
    model = json.loads(backends["byte_level"].to_str())["model"]
    folder = make_folder(vocab=model["vocab"], tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    text = "The capital of 東京 😀"
    assert tokenizer.encode(text, add_special_tokens=False) == tuple(backends["byte_level"].encode(text).ids)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_unconvertible_vocabulary_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="transformers cannot make one"):
        Tokenizer.load(tmp_path)


def test_normalizer_is_kept(make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]) -> None:
    backend = tokenizers.Tokenizer.from_str(backends["byte_level"].to_str())
    backend.normalizer = normalizers.NFC()
    tokenizer = Tokenizer.load(make_folder(backend))
    assert tokenizer.decode(tokenizer.encode("e\u0301", add_special_tokens=False)) == "é"


def test_loading_does_not_import_transformers(
    make_folder: MakeFolder, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    folder = make_folder(backends["byte_level"])
    code = (
        "import sys, pathlib; from vllm_mlx.chat.service import ChatService; from vllm_mlx.chat.tokenizer import "
        "Tokenizer; Tokenizer.load(pathlib.Path(sys.argv[1])); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
