"""The tokenizer of a GGUF file, rebuilt from its metadata as tokenizer.json and tokenizer_config.json.

Two kinds: `gpt2` (byte-level BPE with merges) and `llama` (SentencePiece BPE with scores and byte fallback).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_mlx.models.gguf_config import REMEDY
from vllm_mlx.models.gguf_file import GgufFile
from vllm_mlx.models.gguf_pretokenizers import NFC_KINDS, PATTERNS, WHOLE_WORD_KINDS

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
STOP_TEXTS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
        "<EOT>", "<|end_of_text|>", "<end_of_utterance>",
    }
)  # fmt: skip
"""Control tokens that end an answer whatever the file calls its end token; files often name only one of them."""


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """All that a file says about its tokenizer."""

    kind: str
    """'gpt2' or 'llama'."""
    pre: str
    """How text is split before byte-level BPE, a key of PATTERNS."""
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]
    """Tokens that end an answer, the file's own end token first."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    def token(self, token_id: int | None) -> str | None:
        """The text of a token."""
        return None if token_id is None else self.tokens[token_id]


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """The tokenizer of a file; raises ModelError if it has none, or one of a kind that is not known."""
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    kind, pre = meta.get("model"), meta.get("pre", "default")
    if kind not in ("gpt2", "llama"):
        raise file.refuse(f"tokenizer {kind!r} is not one of gpt2, llama; {REMEDY}.")
    if kind == "gpt2" and pre not in PATTERNS:
        raise file.refuse(f"pre-tokenizer {pre!r} is not one of {', '.join(PATTERNS)}; {REMEDY}.")
    tokens = _texts(file, meta, "tokens")
    types = meta.get("token_type") or [1] * len(tokens)
    scores = meta.get("scores") or [0.0] * len(tokens)
    if len(types) != len(tokens) or len(scores) != len(tokens):
        raise file.refuse("token_type or scores and tokens differ in number; download the file again.")
    ids = {
        name: _token_id(file, meta, name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=_texts(file, meta, "merges") if kind == "gpt2" else [],
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unknown_id=ids["unknown"],
        pad_id=ids["padding"],
        stop_ids=_stop_ids(tokens, types, ids),
        add_bos=_flag(meta, "add_bos_token", kind == "llama" or pre in WHOLE_WORD_KINDS),
        add_eos=_flag(meta, "add_eos_token", False),
        add_space_prefix=_flag(meta, "add_space_prefix", kind == "llama"),
        chat_template=meta.get("tokenizer.chat_template"),
    )


def write_tokenizer(vocabulary: Vocabulary, folder: Path, *, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; `max_length` is the model's context."""
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        # The generic class takes tokenizer.json as it is; those named after a model rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "bos_token": vocabulary.token(vocabulary.bos_id),
        "eos_token": vocabulary.token(vocabulary.eos_id),
        "unk_token": vocabulary.token(vocabulary.unknown_id),
        "pad_token": vocabulary.token(vocabulary.pad_id),
        "chat_template": vocabulary.chat_template,
    }
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer that gives the ids that the file's own runtime gives."""
    tokenizer = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _sentencepiece(vocabulary)
    tokenizer.add_tokens(_added_tokens(vocabulary))
    _add_ends(tokenizer, vocabulary)
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [_pair(merge) for merge in vocabulary.merges]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    bpe = models.BPE(vocab=ids, merges=merges, ignore_merges=vocabulary.pre in WHOLE_WORD_KINDS)
    tokenizer = Tokenizer(bpe)
    if vocabulary.pre in NFC_KINDS:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[vocabulary.pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=vocabulary.add_space_prefix, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    bpe = models.BPE(
        vocab=ids,
        merges=_merges_from_scores(vocabulary, ids),
        unk_token=vocabulary.token(vocabulary.unknown_id),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    space = normalizers.Replace(" ", "▁")
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _merges_from_scores(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Merges in the order that SentencePiece makes them: the best-scored piece first, however it is split."""
    ranked = []
    for token, token_id in ids.items():
        if vocabulary.types[token_id] in (UNKNOWN, CONTROL):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-vocabulary.scores[token_id], token_id, cut, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _added_tokens(vocabulary: Vocabulary) -> list[AddedToken]:
    """Tokens that are found in text before anything else."""
    from tokenizers import AddedToken

    return [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (CONTROL, USER_DEFINED) and token
    ]


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    from tokenizers import processors

    bos = vocabulary.token(vocabulary.bos_id) if vocabulary.add_bos else None
    eos = vocabulary.token(vocabulary.eos_id) if vocabulary.add_eos else None
    if bos is None and eos is None:
        return
    single = [bos, "$A", eos]
    pair = [bos, "$A", eos, bos and f"{bos}:1", "$B:1", eos and f"{eos}:1"]
    ids = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} - {None} if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[part for part in single if part], pair=[part for part in pair if part], special_tokens=ids
    )


def _pair(merge: str) -> tuple[str, str]:
    """The two halves of a merge; the first is never empty, so a leading space belongs to it."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _stop_ids(tokens: list[str], types: list[int], ids: dict[str, int | None]) -> tuple[int, ...]:
    named = [ids[name] for name in ("eos", "eot", "eom")]
    found = [i for i, text in enumerate(tokens) if types[i] == CONTROL and text in STOP_TEXTS]
    return tuple(dict.fromkeys(i for i in [*named, *found] if i is not None))


def _texts(file: GgufFile, meta: dict[str, Any], name: str) -> list[str]:
    value = meta.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise file.refuse(f"has no tokenizer.ggml.{name}; {REMEDY}.")
    return value


def _token_id(file: GgufFile, meta: dict[str, Any], name: str, num_tokens: int) -> int | None:
    value = meta.get(f"{name}_token_id")
    if value is None or value == 0xFFFFFFFF:
        return None
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise file.refuse(f"tokenizer.ggml.{name}_token_id is {value!r}, but there are {num_tokens} tokens.")
    return value


def _flag(meta: dict[str, Any], name: str, default: bool) -> bool:
    return bool(meta.get(name, default))
