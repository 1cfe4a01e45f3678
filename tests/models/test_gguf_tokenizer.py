"""A tokenizer rebuilt from GGUF metadata gives the ids of the tokenizer that the metadata was taken from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vllm_mlx.models.gguf_file import read_header
from vllm_mlx.models.gguf_tokenizer import build_tokenizer, read_vocabulary, write_tokenizer

MakeGguf = Callable[..., Path]

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 2024 and we'll see 12345 foxes, they've 3 dens.",
    "def main():\n    return [i ** 2 for i in range(100)]\n\n\nclass Fox(Animal):\n\tdens = 3\n",
    "Der flinke Fuchs läßt 1.000.000 Hühner grüßen.  Ça va? ¿Qué tal? Ελληνικά, русский, 日本語のテキスト, 한국어.",
    "I'M SURE THEY'LL SAY 'TIS THE FOX'S DEN -- 99.9% ... http://example.org/a?b=c&d=e#f",
] * 8
AWKWARD = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n \n",
    "\r\n\tx",
    "a  b   c ",
    " trailing   ",
    "it's IT'S they'Ve we'LL 's",
    "1 12 123 1234 12345 ½ ² ٣٤",
    "foo123bar 4x4",
    "naïve café",
    "nai\u0308ve cafe\u0301",
    "日本語のテキスト",
    "🦊🦊 fox 👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<tool>x</tool><|im_end|>",
    "\u00a0nbsp\u3000wide",
    "x=[1,2,3];//ok\n\n\n  }",
    "Ελληνικά русский 한국어",
    "\x00\x01\ufffd",
    "...?!\n...?!",
    "ABCdefGHI jKL",
    "▁already▁",
    "a" * 70,
]

PUBLISHED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def published(pattern: str) -> Any:
    """Pre-tokenizer as the tokenizer.json of Llama 3 and Qwen 2 have it."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def original(pre: str) -> Any:
    """The pre-tokenizer that the models themselves come with."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": published(PUBLISHED % r"\p{N}{1,3}"),
        "qwen2": published(PUBLISHED % r"\p{N}"),
    }[pre]


def trained(pre: str) -> Tokenizer:
    """A small byte-level tokenizer trained here."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = original(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=alphabet,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def as_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes for a byte-level tokenizer."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    special = {"<|im_start|>": 3, "<|im_end|>": 3, "<tool>": 4}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [special.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": ids["<|im_start|>"],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.add_bos_token": False,
    }


def rebuilt(make_gguf: MakeGguf, extra: dict[str, Any], *, num_tokens: int) -> Tokenizer:
    path = make_gguf(extra=extra)
    vocabulary = read_vocabulary(read_header(path))
    assert len(vocabulary.tokens) == num_tokens
    return build_tokenizer(vocabulary)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_ids_equal_those_of_the_original(make_gguf: MakeGguf, pre: str) -> None:
    reference = trained(pre)
    tokenizer = rebuilt(make_gguf, as_metadata(reference, pre), num_tokens=reference.get_vocab_size())
    for text in [*AWKWARD, *CORPUS[:4]]:
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text).ids, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_kinds_split_digits_differently(make_gguf: MakeGguf) -> None:
    """The test above could not fail if all kinds split alike."""
    lengths = {}
    for pre in ("smollm", "llama-bpe", "gpt-2"):
        tokenizer = build_tokenizer(read_vocabulary(read_header(make_gguf(extra={"tokenizer.ggml.pre": pre}))))
        assert tokenizer.pre_tokenizer is not None
        lengths[pre] = len(tokenizer.pre_tokenizer.pre_tokenize_str("12345"))
    assert lengths == {"smollm": 5, "llama-bpe": 2, "gpt-2": 1}


def train_sentencepiece(prefix: bool) -> Any:
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        split_digits=True,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_those_of_sentencepiece(make_gguf: MakeGguf, prefix: bool) -> None:
    reference = train_sentencepiece(prefix)
    size = reference.get_piece_size()

    def kind(i: int) -> int:
        if reference.is_unknown(i):
            return 2
        if reference.is_control(i):
            return 3
        if reference.is_byte(i):
            return 6
        return 4 if reference.id_to_piece(i) == "<tool>" else 1

    extra = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [reference.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(size)],
        "tokenizer.ggml.bos_token_id": reference.bos_id(),
        "tokenizer.ggml.eos_token_id": reference.eos_id(),
        "tokenizer.ggml.unknown_token_id": reference.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = rebuilt(make_gguf, extra, num_tokens=size)
    # After a user-defined symbol llama.cpp adds a space where sentencepiece does not: those texts are left out.
    for text in [text for text in [*AWKWARD, *CORPUS[:4]] if text and "<" not in text]:
        expected = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, repr(text)
        assert tokenizer.decode(expected) == reference.decode(expected), repr(text)
    assert tokenizer.encode("x").ids[0] == reference.bos_id()


def test_start_token_follows_the_file_then_the_kind(make_gguf: MakeGguf) -> None:
    for pre, flag, expected in (
        ("gpt-2", None, []),
        ("gpt-2", True, [0]),
        ("llama-bpe", None, [0]),
        ("llama-bpe", False, []),
    ):
        extra = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": flag}
        tokenizer = rebuilt(make_gguf, extra, num_tokens=6)
        assert tokenizer.encode("ab").ids == [*expected, 4]
        assert tokenizer.encode("ab", add_special_tokens=False).ids == [4]


def test_end_token_is_added_where_the_file_says_so(make_gguf: MakeGguf) -> None:
    tokenizer = rebuilt(make_gguf, {"tokenizer.ggml.add_eos_token": True}, num_tokens=6)
    assert tokenizer.encode("ab", "c").ids == [4, 0, 3, 0]


def test_all_tokens_that_end_an_answer_are_found(make_gguf: MakeGguf) -> None:
    extra = {
        "tokenizer.ggml.tokens": ["</s>", "a", "<|eot_id|>", "<|im_end|>", "<|eom_id|>", "<EOT>"],
        "tokenizer.ggml.token_type": [3, 1, 3, 3, 3, 1],
        "tokenizer.ggml.merges": ["a a"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 3,
    }
    vocabulary = read_vocabulary(read_header(make_gguf(extra=extra)))
    assert vocabulary.stop_ids == (0, 3, 2, 4)


def test_written_files_hold_template_and_special_tokens(make_gguf: MakeGguf, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(read_header(make_gguf()))
    write_tokenizer(vocabulary, tmp_path, max_length=512)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages[0].content }}"
    assert config["eos_token"] == "<|end|>"
    assert config["model_max_length"] == 512
    assert "bos_token" not in config
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("abc<|end|>").ids == [4, 3, 0]
    assert tokenizer.decode([4, 0, 3]) == "abc"


def test_demo_tokenizer_and_template_give_the_known_ids(demo_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    assert tokenizer.encode("1, 2, 3, 4, 5, 6,").ids == [
        *(33, 28, 216, 34, 28, 216, 35, 28, 216, 36, 28, 216, 37, 28, 216, 38, 28),
    ]
    assert tokenizer.encode("<|im_start|>assistant\n").ids == [1, 520, 9531, 198]
    config = json.loads((demo_model / "tokenizer_config.json").read_text())
    assert "You are a helpful AI assistant named SmolLM" in config["chat_template"]
    assert (config["eos_token"], config["add_bos_token"]) == ("<|im_end|>", False)
