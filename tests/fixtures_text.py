"""A small tokenizer with a chat template, and scripts that make a fake model write readable text."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_ID = 2
"""`<|im_end|>`."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and runs away from the river into the green forest",
    "one two three four five six seven eight nine ten eleven twelve count hello again story little",
    "system user assistant you are helpful weather in Paris capital of France once upon a time there was",
)


def write_tokenizer(folder: Path, *, marks: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE: every text can be encoded, common words are one token. `marks` become special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(list(marks))
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


class WordScript:
    """The next token is a word that depends on everything before it; `eos_every`: one in so many is the end."""

    def __init__(self, backend: tokenizers.Tokenizer, *, eos_every: int | None = None) -> None:
        words = [token for text in CORPUS for token in backend.encode(" " + text).ids]
        self._words = sorted(set(words))
        self._eos_every = eos_every

    def __call__(self, tokens: tuple[int, ...]) -> int:
        value = zlib.crc32(array("q", tokens).tobytes())
        if self._eos_every is not None and value % self._eos_every == 0:
            return EOS_ID
        return self._words[value // 7 % len(self._words)]
