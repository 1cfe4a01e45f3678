"""What is sent in blocks arrives as it was; and a block's number stands for its tokens."""

from __future__ import annotations

import msgspec
import pytest

from vllm_mlx.core.messages import Abort, Submit, ToEngine
from vllm_mlx.core.prompt import BLOCK_TOKENS, Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.token_blocks import BlockReader, SentSubmit, sent
from vllm_mlx.engine.vocabulary import MAX_BLOCKS, Vocabulary

SIZES = [0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS, 3 * BLOCK_TOKENS + 7]


def submit(token_ids: tuple[int, ...], salt: bytes = b"") -> Submit:
    return Submit(
        "a", Prompt(token_ids, salt), SamplingParams(seed=1), priority=2, resume_token_ids=(5, 6), keeps=((3, 4),)
    )


def passed(reader: BlockReader, message: ToEngine) -> ToEngine:
    """Through the wire."""
    decoder = msgspec.msgpack.Decoder(ToEngine | SentSubmit)
    return reader.read(decoder.decode(msgspec.msgpack.encode(sent(message))))


def prompt_of(message: ToEngine) -> Prompt:
    assert isinstance(message, Submit)
    return message.prompt


@pytest.mark.parametrize("size", SIZES)
def test_a_prompt_of_any_length_arrives_as_it_was_sent(size: int) -> None:
    reader, message = BlockReader(), submit(tuple(range(100, 100 + size)), b"salt")
    for _ in range(2):
        arrived = passed(reader, message)
        assert len(prompt_of(arrived).blocks) == size // BLOCK_TOKENS
        assert isinstance(arrived, Submit)
        assert msgspec.structs.replace(arrived, prompt=Prompt(prompt_of(arrived).token_ids, b"salt")) == message


def test_other_messages_arrive_as_they_are() -> None:
    assert passed(BlockReader(), Abort("a")) == Abort("a")


def test_equal_blocks_have_one_number_and_others_another() -> None:
    reader = BlockReader()
    one, two, three = ((i,) * BLOCK_TOKENS for i in range(3))
    first = prompt_of(passed(reader, submit(one + two + (7,))))
    second = prompt_of(passed(reader, submit(one + three + (8,))))
    third = prompt_of(passed(reader, submit(one + two + (9,))))
    assert first.blocks == third.blocks
    assert first.blocks[0] == second.blocks[0]
    assert first.blocks[1] != second.blocks[1]
    assert third.token_ids == one + two + (9,)


def test_a_block_that_was_forgotten_gets_a_new_number() -> None:
    reader = BlockReader(max_blocks=1)
    one, two = ((i,) * BLOCK_TOKENS for i in range(2))
    first = prompt_of(passed(reader, submit(one)))
    prompt_of(passed(reader, submit(two)))
    again = prompt_of(passed(reader, submit(one)))
    assert len(reader) == 1
    assert again.token_ids == one
    assert again.blocks != first.blocks


def test_a_token_outside_the_vocabulary_is_found_wherever_it_is() -> None:
    vocabulary, good = Vocabulary(10), (1,) * BLOCK_TOKENS
    assert vocabulary.first_outside(Prompt((*good, 9), b"", (0,))) is None
    assert vocabulary.first_outside(Prompt((*good, 10), b"", (0,))) == 10
    assert vocabulary.first_outside(Prompt((*good, 9), b"", (0,)), (3, -1)) == -1
    bad = (*good[1:], 11)
    assert vocabulary.first_outside(Prompt((*bad, 9), b"", (1,))) == 11
    assert vocabulary.first_outside(Prompt((*good, *bad), b"", (0, 1))) == 11
    assert vocabulary.first_outside(Prompt(bad)) == 11


def test_a_block_that_was_looked_at_is_not_looked_at_again() -> None:
    vocabulary, good = Vocabulary(10), (1,) * BLOCK_TOKENS
    assert vocabulary.first_outside(Prompt(good, b"", (0,))) is None
    assert vocabulary.first_outside(Prompt((99,) * BLOCK_TOKENS, b"", (0,))) is None  # no sender gives it that number
    vocabulary.first_outside(Prompt((), b"", tuple(range(1, MAX_BLOCKS + 1))))
    assert vocabulary.first_outside(Prompt((99,) * BLOCK_TOKENS, b"", (0,))) == 99
