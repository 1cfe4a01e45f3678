"""Names that are taken from earlier prompts are those that hashing gives."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.core.prompt import BLOCK_TOKENS
from vllm_mlx.kv import chains
from vllm_mlx.kv.blocks import page_names
from vllm_mlx.kv.chains import MIN_PAGES, Chains

PAGE = 4
LONG = MIN_PAGES * PAGE


def hashed(token_ids: list[int], count: int, salt: bytes = b"") -> list[bytes]:
    return list(page_names(b"", token_ids[: count * PAGE], page_size=PAGE, salt=salt))


@st.composite
def prompts(draw: st.DrawFn) -> list[tuple[list[int], bytes]]:
    """Prompts that part from each other, and go on from each other, anywhere."""
    made: list[tuple[list[int], bytes]] = [([], b"")]
    for _ in range(draw(st.integers(1, 12))):
        earlier, _ = draw(st.sampled_from(made))
        begin = earlier[: draw(st.integers(0, len(earlier)))]
        more = draw(st.lists(st.integers(0, 2), max_size=3 * LONG))
        made.append((begin + more, draw(st.sampled_from([b"", b"other"]))))
    return made


@given(prompts(), st.integers(1, 3))
def test_names_are_those_that_hashing_gives(asked: list[tuple[list[int], bytes]], max_chains: int) -> None:
    known = Chains(page_size=PAGE, max_chains=max_chains, max_tokens=4 * LONG)
    for token_ids, salt in asked:
        count = len(token_ids) // PAGE
        found = known.names(token_ids, count, salt=salt)
        assert found == hashed(token_ids, count, salt)
        found.append(b"the caller's own")
        assert len(known) <= max_chains


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 3 * PAGE)), max_size=12))
def test_blocks_stand_for_their_tokens(asked: list[tuple[str, int, int]]) -> None:
    known, numbers = Chains(page_size=PAGE), {"a": 1, "b": 2, "c": 3}
    for letter, num_blocks, num_more in asked:
        order = [letter, "a", "b"][:num_blocks]
        token_ids = [ord(each) for each in order for _ in range(BLOCK_TOKENS)] + [ord(letter)] * num_more
        count = max(0, len(token_ids) - 1) // PAGE
        blocks = tuple(numbers[each] for each in order)
        assert known.names(token_ids, count, salt=b"", blocks=blocks) == hashed(token_ids, count)


def test_what_was_hashed_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids, num_bytes = list(range(40 * LONG)), []

    def counted(parent: bytes, packed: bytes, **given: object) -> list[bytes]:
        num_bytes.append(len(packed))
        return list(page_names(parent, token_ids[-(len(packed) // 8) :], page_size=PAGE, salt=b"")) if packed else []

    monkeypatch.setattr(chains, "packed_names", counted)
    known = Chains(page_size=PAGE)
    known.names(token_ids, len(token_ids) // PAGE, salt=b"")
    known.names([*token_ids, *range(PAGE)], len(token_ids) // PAGE + 1, salt=b"")
    known.names(token_ids, len(token_ids) // PAGE, salt=b"")
    assert num_bytes == [8 * len(token_ids), 8 * PAGE, 0]


def test_short_prompts_do_not_push_out_a_long_one() -> None:
    draw, known = random.Random(0), Chains(page_size=PAGE, max_chains=2)
    known.names(list(range(LONG)), MIN_PAGES, salt=b"")
    for _ in range(5):
        known.names([draw.randrange(100) for _ in range(LONG - PAGE)], MIN_PAGES - 1, salt=b"")
    assert len(known) == 1


def test_prompts_that_differ_at_their_ends_are_one_chain() -> None:
    known, count = Chains(page_size=PAGE), 2 * MIN_PAGES
    for last in range(5):
        known.names([*range(2 * LONG - 1), last], count, salt=b"")
    assert len(known) == 1


def test_the_latest_chain_stays_however_long_it_is() -> None:
    known = Chains(page_size=PAGE, max_tokens=LONG)
    for first in range(3):
        known.names([first] * 4 * LONG, 4 * MIN_PAGES, salt=b"")
    assert len(known) == 1
