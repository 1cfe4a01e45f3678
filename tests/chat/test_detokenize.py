"""Streaming text equals text at once, whatever the tokens."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.chat.detokenize import Detokenizer
from vllm_mlx.chat.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, token_ids: list[int] | tuple[int, ...], *, context: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context=context)
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.finish()]


@given(token_ids=st.lists(st.integers(0, 430), max_size=60))
def test_pieces_join_to_the_whole_for_any_tokens(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁\ufffd")))
def test_no_piece_holds_a_partial_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


@given(before=st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1), after=st.text(max_size=20))
def test_continuation_is_what_the_whole_has_after_the_prompt(byte_level: Tokenizer, before: str, after: str) -> None:
    context = byte_level.encode(before, add_special_tokens=True)
    token_ids = byte_level.encode(after, add_special_tokens=False)
    assert before + "".join(stream(byte_level, token_ids, context=context)) == byte_level.decode(context + token_ids)


def test_continuation_keeps_its_leading_space(sentencepiece: Tokenizer) -> None:
    context = sentencepiece.encode("The capital of France is", add_special_tokens=True)
    token_ids = sentencepiece.encode("Paris", add_special_tokens=False)
    assert stream(sentencepiece, token_ids, context=context) == [" Par", "is", ""]
    assert stream(sentencepiece, token_ids) == ["Par", "is", ""]


def test_only_one_leading_space_is_taken_off(sentencepiece: Tokenizer) -> None:
    space = sentencepiece.token_id("▁")
    assert space is not None
    assert stream(sentencepiece, [space, space, space]) == ["", " ", " ", ""]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_emoji_comes_with_its_last_token(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    space = kind == "sentencepiece"
    token_ids = tokenizer.encode("🦖", add_special_tokens=False)[space:]
    assert len(token_ids) > 2
    assert stream(tokenizer, token_ids, context=(5,)) == [*[""] * (len(token_ids) - 1), "🦖", ""]


def test_unfinished_character_is_one_replacement_at_the_end(sentencepiece: Tokenizer) -> None:
    token_ids = sentencepiece.encode("🦖", add_special_tokens=False)[:-1]
    assert stream(sentencepiece, token_ids, context=(1,)) == [" ", "", "", "", "\ufffd"]


def test_invalid_bytes_do_not_hold_up_the_text_after_them(sentencepiece: Tokenizer) -> None:
    wrong, letter = sentencepiece.token_id("<0xFF>"), sentencepiece.token_id("a")
    assert wrong is not None
    assert letter is not None
    assert stream(sentencepiece, [wrong, letter], context=(1,)) == ["\ufffd", "a", ""]


def test_character_begun_by_the_prompt_is_completed(byte_level: Tokenizer) -> None:
    by_bytes = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size)}
    context = (*byte_level.encode("Gro", add_special_tokens=False), by_bytes[b"\xc3"])
    assert stream(byte_level, [by_bytes[b"\x9f"]], context=context) == ["ß", ""]


def test_special_tokens_are_not_shown_and_added_text_is(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a<|im_start|><tool_call><|im_end|>", add_special_tokens=False)
    assert stream(byte_level, token_ids) == ["a", "", "<tool_call>", "", ""]


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁\ufffd"), min_size=1))
def test_library_stream_gives_the_same_valid_text(
    byte_level: Tokenizer, backends: dict[str, tokenizers.Tokenizer], text: str
) -> None:
    token_ids = byte_level.encode(text, add_special_tokens=False)
    theirs = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
    pieces = [theirs.step(backends["byte_level"], token_id) or "" for token_id in token_ids]
    assert "".join(stream(byte_level, token_ids)) == "".join(pieces)
