"""The memory of earlier prompts: bounded, private to a salt, and right about what is in common."""

from __future__ import annotations

import random

from vllm_mlx.chat.seen import NUM_AFTER, NUM_BEFORE, Outline, SeenPrompts, part_key

PAGE = 4
PLAIN = Outline()


def test_nearest_is_the_prompt_with_the_longest_beginning_in_common() -> None:
    seen = SeenPrompts()
    seen.add("a", [1, 2, 3, 4, 9, 9], PLAIN)
    seen.add("b", [1, 2, 3, 4, 5, 6, 8], PLAIN)
    seen.add("c", [1, 2, 7, 7, 7, 7, 7], PLAIN)
    found = seen.nearest([1, 2, 3, 4, 5, 6, 7, 8], PLAIN, page_size=PAGE)
    assert found is not None
    assert (found.num_common, found.before_ids) == (6, (1, 2, 3, 4, 5, 6))
    assert (found.given_ids, found.earlier_ids) == ((7, 8), (8,))


def test_number_in_common_equals_a_plain_comparison() -> None:
    rng = random.Random(1)
    for _ in range(300):
        earlier = [rng.randrange(3) for _ in range(rng.randrange(1, 40))]
        given = [*earlier[: rng.randrange(len(earlier) + 1)], *(rng.randrange(3) for _ in range(rng.randrange(1, 9)))]
        expected = 0
        while expected < min(len(given), len(earlier)) and given[expected] == earlier[expected]:
            expected += 1
        seen = SeenPrompts()
        seen.add("a", earlier, PLAIN)
        found = seen.nearest(given, PLAIN, page_size=PAGE)
        assert (found.num_common if found else 0) == expected


def test_an_answer_counts_as_a_part_of_its_prompt() -> None:
    seen = SeenPrompts()
    seen.add("a", [1, 2, 3], PLAIN)
    seen.extend("a", [4, 5])
    seen.extend("unknown", [6])
    found = seen.nearest([1, 2, 3, 4, 5, 6], PLAIN, page_size=PAGE)
    assert found is not None
    assert (found.num_common, found.earlier_ids) == (4, ())  # an answer's last token is never computed


def test_the_next_turn_replaces_the_one_before() -> None:
    seen = SeenPrompts()
    seen.add("a", [1, 2], PLAIN)
    seen.add("other", [2, 2], PLAIN)
    seen.add("b", [1, 2, 3], PLAIN)
    assert len(seen) == 2


def test_another_salt_is_never_compared() -> None:
    seen = SeenPrompts()
    seen.add("a", [1, 2, 3, 4, 5], Outline(salt=b"one", system=part_key("You are helpful.")))
    given = Outline(salt=b"two", system=part_key("You are helpful."))
    assert seen.nearest([1, 2, 3, 4, 5], given, page_size=PAGE) is None
    seen.add("b", [1, 2, 3, 4, 5, 6], given)
    assert len(seen) == 2


def test_beginnings_of_less_than_a_page_are_ranked_by_parts_in_common() -> None:
    seen = SeenPrompts()
    seen.add("alike", [1, 5, 5], Outline(opening=part_key("Hi")))
    seen.add("chance", [1, 2, 9], Outline(opening=part_key("Bye")))
    found = seen.nearest([1, 2, 3], Outline(opening=part_key("Hi")), page_size=PAGE)
    assert found is not None
    assert found.outline.opening == part_key("Hi")


def test_memory_is_bounded_in_number_and_in_bytes() -> None:
    seen = SeenPrompts(max_prompts=3, max_bytes=4 * 100)
    for index in range(10):
        seen.add(str(index), [index, 1, 2], PLAIN)
    assert len(seen) == 3
    seen.add("long", range(90), PLAIN)
    assert seen.size_bytes == 4 * 96
    seen.extend("long", range(90))
    assert len(seen) == seen.size_bytes == 0


def test_only_the_tokens_around_the_difference_are_shown() -> None:
    seen = SeenPrompts()
    seen.add("a", [*range(500), *range(9000, 9500)], PLAIN)
    found = seen.nearest(range(1000), PLAIN, page_size=PAGE)
    assert found is not None
    assert found.before_ids == tuple(range(500 - NUM_BEFORE, 500))
    assert found.given_ids == tuple(range(500, 500 + NUM_AFTER))
    assert found.earlier_ids == tuple(range(9000, 9000 + NUM_AFTER))
