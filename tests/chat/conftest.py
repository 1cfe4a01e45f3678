"""Small real tokenizers, built with the library that reads the big ones, and model folders around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from vllm_mlx.chat.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The capital of France is Paris.",
    "Grüße aus Köln, naïve café, 東京 と 大阪, смотри, 😀😀 👩‍👩‍👧 is a family.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # three",
] * 3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTE_LEVEL_CONFIG = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHATML}
SENTENCEPIECE_CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}


def byte_level_backend() -> tokenizers.Tokenizer:
    """GPT-2's kind: byte-level BPE, three special tokens, one added token that is text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    return backend


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """Llama-2's kind: a space before the text, U+2581 for spaces, bytes for characters outside the vocabulary."""
    letters = "▁abcdefghijklmnopqrstuvwxyzFPT."
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁P", "ar", "▁Par", "is"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "P"), ("a", "r"), ("▁P", "ar"), ("i", "s")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


MakeFolder = Callable[..., Path]
"""(backend or None, file name with `_` for `.` -> content) -> a model folder."""


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    def make(backend: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
        if backend is not None:
            (tmp_path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        for stem, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{stem}.json").write_text(text, encoding="utf-8")
        return tmp_path

    return make


def load(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> Tokenizer:
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory.mktemp("byte_level"), byte_level_backend(), BYTE_LEVEL_CONFIG)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory.mktemp("sentencepiece"), sentencepiece_backend(), SENTENCEPIECE_CONFIG)


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Tokenizer)
    return found


@pytest.fixture(scope="session")
def backends() -> dict[str, tokenizers.Tokenizer]:
    return {"byte_level": byte_level_backend(), "sentencepiece": sentencepiece_backend()}
