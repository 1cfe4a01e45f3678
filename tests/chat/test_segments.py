"""A text in pieces has the tokens of the whole text, whatever the tokenizer and whatever was encoded before."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from vllm_mlx.chat import beginnings, segments
from vllm_mlx.chat.segments import SegmentEncoder, Segments

WORDS = ["the quick fox", " jumps", "  ", "\n\n", "é東😀", "<", "|", "<|im", "_", "a" * 40]
ADDED = [
    AddedToken("<|im_start|>", normalized=False, special=True),
    AddedToken("<|im_start|>x", normalized=False),
    AddedToken("<tool>", normalized=False),
    AddedToken("<left>", normalized=False, lstrip=True),
    AddedToken("<right>", normalized=False, rstrip=True),
    AddedToken("<word>", normalized=False, single_word=True),
    AddedToken("Quick", normalized=True),
    AddedToken("\n\n", normalized=False),
]
KINDS = {
    "byte_level": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix_space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "prepend": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        pre_tokenizers.Split("▁", behavior="merged_with_next"),
    ),
    "lowercase": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
}


def backend(kind: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    normalizer, pre_tokenizer = KINDS[kind]
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the quick fox jumps over it, quick fox", "é東😀 <|im|>"] * 5, trainer)
    made.add_tokens(ADDED)
    return made


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MIN_CHARS", 4)
    monkeypatch.setattr(beginnings, "MIN_TOKENS", 1)


BACKENDS = {kind: backend(kind) for kind in KINDS}
texts = st.lists(st.sampled_from([*WORDS, *(token.content for token in ADDED)]), max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(beginning=texts, ends=st.lists(texts, min_size=1, max_size=3), where=st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(kind: str, beginning: str, ends: list[str], where: int) -> None:
    whole = BACKENDS[kind]
    encoder = SegmentEncoder(whole, max_kept_bytes=4000)
    for end in ends:
        text = beginning + end
        found = Segments(text, encoder)
        ids = tuple(whole.encode(text, add_special_tokens=False).ids)
        assert found.token_ids == ids
        assert found.largest_id == max(ids, default=0)
        position = found.position(where % (len(text) + 1))
        part = tuple(whole.encode(text[: where % (len(text) + 1)], add_special_tokens=False).ids)
        assert position in (0, len(part))
        assert position == 0 or ids[:position] == part


class Recording:
    """A tokenizer that tells what it was given."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self.given: list[str] = []

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        found: dict[int, AddedToken] = self._inner.get_added_tokens_decoder()
        return found

    def encode_batch_fast(self, given: list[str], *, add_special_tokens: bool) -> list[tokenizers.Encoding]:
        self.given += given
        found: list[tokenizers.Encoding] = self._inner.encode_batch_fast(given, add_special_tokens=add_special_tokens)
        return found


def test_a_longer_conversation_encodes_only_what_is_new() -> None:
    recording = Recording(BACKENDS["byte_level"])
    encoder = SegmentEncoder(recording)
    turns = [f"<|im_start|>turn {number}" for number in range(9)]
    Segments("".join(turns[:8]), encoder)
    recording.given.clear()
    Segments("".join(turns), encoder)
    assert recording.given == [turns[8]]


def test_positions_are_known_between_tokens_only() -> None:
    text = "<|im_start|>the fox<|im_start|>jumps"
    found = Segments(text, SegmentEncoder(BACKENDS["byte_level"]))
    ids = BACKENDS["byte_level"].encode
    assert found.position(text.rindex("<")) == len(ids("<|im_start|>the fox").ids)
    assert found.position(text.rindex("<") + 3) == 0
    assert found.position(0) == 0
    assert found.position(len(text)) == len(found.token_ids)


def test_a_tokenizer_without_added_tokens_encodes_the_whole() -> None:
    plain = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    assert Segments("abba" * 3, SegmentEncoder(plain)).token_ids == (0, 1, 1, 0) * 3
