"""Every reason for a miss, from what was found and what was asked before."""

from __future__ import annotations

import pytest

from vllm_mlx.chat.explain import CacheReason, Explainer, Explanation
from vllm_mlx.chat.seen import Outline, SeenPrompts, part_key
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout

PAGE = 8
PAGED = CacheSpec(layers=(LayerSpec(Layout.PAGES),), page_size=PAGE, page_bytes=1)
RECURRENT = CacheSpec(layers=(LayerSpec(Layout.STATE),), page_size=PAGE, page_bytes=1)
PLAIN = Outline()
START = "The quick brown fox jumps over the lazy dog. " * 3


class Case:
    """Earlier texts, then one more that is explained."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.seen = SeenPrompts()

    def ids(self, text: str) -> tuple[int, ...]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def ask(self, text: str, outline: Outline = PLAIN) -> None:
        self.seen.add(text, self.ids(text), outline)

    def explain(
        self, text: str, outline: Outline = PLAIN, *, found: int | None = None, cache: CacheSpec = PAGED
    ) -> Explanation:
        """`found`: by default, all whole pages in common with an earlier prompt."""
        ids = self.ids(text)
        nearest = self.seen.nearest(ids, outline, page_size=PAGE)
        if found is None:
            found = min(nearest.num_common if nearest else 0, len(ids) - 1) // PAGE * PAGE
        explainer = Explainer(self.tokenizer, is_enabled=True)
        return explainer.explain(len(ids), found, outline=outline, nearest=nearest, cache=cache)


@pytest.fixture
def case(byte_level: Tokenizer) -> Case:
    return Case(byte_level)


def test_prompt_that_was_found_as_far_as_it_can_be_is_a_hit(case: Case) -> None:
    case.ask(START)
    for text in (START, START + "And more."):
        found = case.explain(text)
        assert (found.reason, found.difference) == (CacheReason.HIT, None)
        assert found.num_found >= PAGE


def test_tokens_that_were_computed_and_are_not_found_were_evicted(case: Case) -> None:
    case.ask(START)
    found = case.explain(START, found=PAGE)
    assert found.reason is CacheReason.EVICTED
    assert f"{PAGE} of them" in found.message
    assert case.explain(START, found=0, cache=RECURRENT).reason is CacheReason.NO_CHECKPOINT


def test_first_prompt_was_never_seen(case: Case) -> None:
    assert case.explain(START).reason is CacheReason.NEVER_SEEN
    case.ask("смотри, 😀😀")
    assert case.explain(START).reason is CacheReason.NEVER_SEEN


def test_more_than_is_known_of_earlier_prompts_is_a_hit(case: Case) -> None:
    assert case.explain(START, found=2 * PAGE).reason is CacheReason.HIT


def test_less_than_a_page_is_too_short(case: Case) -> None:
    case.ask("The fox")
    assert case.explain("The fox jumps").reason is CacheReason.TOO_SHORT


def test_texts_are_shown_from_the_first_character_that_differs(case: Case) -> None:
    case.ask(START + "The capital of France is Paris.")
    found = case.explain(START + "The capital of Germany is Berlin.")
    assert found.reason is CacheReason.DIFFERENT_MESSAGES
    assert found.difference is not None
    assert found.difference.before.endswith("The capital of ")
    assert found.difference.given == "Germany is Berlin."
    assert found.difference.earlier == "France is Paris."
    assert found.num_found <= found.num_seen


def test_other_system_text_and_other_tools_are_told_apart(case: Case) -> None:
    base = Outline(tools=part_key("[]"), system=part_key("one"), opening=part_key("Hi"))
    case.ask(START + "one", base)
    system = Outline(base.salt, base.tools, part_key("two"), base.opening)
    tools = Outline(base.salt, part_key("[1]"), base.system, base.opening)
    assert case.explain(START + "two", system).reason is CacheReason.DIFFERENT_SYSTEM
    assert case.explain(START + "two", tools).reason is CacheReason.DIFFERENT_TOOLS
    # The same opening tells that it is the same conversation, even if no page is in common.
    assert case.explain("смотри " + START, system).reason is CacheReason.DIFFERENT_SYSTEM


def test_date_that_changed_is_called_so(case: Case) -> None:
    case.ask(START + "Today is 2026-11-21. Hello!")
    found = case.explain(START + "Today is 2026-11-22. Hello!")
    assert found.reason is CacheReason.VOLATILE_FIELD
    assert found.difference is not None
    assert found.difference.field == "date"
    assert "date" in found.message


def test_server_without_a_prefix_cache_says_so(byte_level: Tokenizer) -> None:
    explainer = Explainer(byte_level, is_enabled=False)
    found = explainer.explain(100, 0, outline=Outline(), nearest=None, cache=PAGED)
    assert found.reason is CacheReason.DISABLED
