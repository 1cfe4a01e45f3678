"""Events come out the same however their bytes are cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.bench.sse import EventReader

TEXT = b': keep-alive\n\ndata: {"a": 1}\n\nevent: x\ndata:two\r\n\r\ndata: l1\ndata: l2\n\nid: 7\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b"two", b"l1\nl2", b"[DONE]"]


@given(st.lists(st.integers(0, len(TEXT))))
def test_cuts_make_no_difference(cuts: list[int]) -> None:
    reader, found, ends = EventReader(), [], [0, *sorted(cuts), len(TEXT)]
    for begin, end in itertools.pairwise(ends):
        found += reader.feed(TEXT[begin:end])
    assert found == EVENTS


def test_event_is_given_with_its_blank_line_and_not_before() -> None:
    reader = EventReader()
    assert reader.feed(b"data: x") == []
    assert reader.feed(b"\n") == []
    assert reader.feed(b"\n") == [b"x"]
