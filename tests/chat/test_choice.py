"""One choice: what is sent, when, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.chat.choice import ChoiceDecoder
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.events import Event, Finish, TextDelta
from vllm_mlx.core.messages import FinishReason, Output
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import TokenLogprobs

EOS = 2
PROMPT = (5, 6, 7)


def decoder(tokenizer: Tokenizer, *, stream_interval: int = 1, echo: str = "", **sampling: Any) -> ChoiceDecoder:
    return ChoiceDecoder(
        tokenizer,
        choice=0,
        prompt_ids=PROMPT,
        sampling=SamplingParams(**sampling),
        stream_interval=stream_interval,
        echo=echo,
    )


def outputs(
    token_ids: tuple[int, ...], *, finish: FinishReason = FinishReason.LENGTH, logprobs: bool = False
) -> list[Output]:
    """One output a token, as an engine sends them."""
    last = len(token_ids) - 1
    return [
        Output(
            "r",
            (token_id,),
            logprobs=(TokenLogprobs(-float(index), (token_id, 5), (-float(index), -9.0)),) if logprobs else None,
            finish=finish if index == last else None,
        )
        for index, token_id in enumerate(token_ids)
    ]


def read(choice: ChoiceDecoder, given_outputs: list[Output]) -> list[Event]:
    events: list[Event] = []
    for output in given_outputs:
        events += choice.read(output)
        if choice.is_finished:
            break
    return events


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def finish_of(events: list[Event]) -> Finish:
    assert isinstance(events[-1], Finish)
    return events[-1]


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_text_comes_token_by_token_and_ends_with_finish(byte_level: Tokenizer) -> None:
    token_ids = ids(byte_level, "The fox")
    events = read(decoder(byte_level), outputs((*token_ids, EOS), finish=FinishReason.STOP))
    assert [event.text for event in events[:-1] if isinstance(event, TextDelta)] == [
        byte_level.token_text(i) for i in token_ids
    ]
    assert finish_of(events).reason is FinishReason.STOP
    assert finish_of(events).usage.prompt_tokens == 3
    assert finish_of(events).usage.completion_tokens == len(token_ids) + 1


def test_stop_token_that_is_text_is_not_shown(byte_level: Tokenizer) -> None:
    token_ids = ids(byte_level, "a b")
    events = read(decoder(byte_level), outputs(token_ids, finish=FinishReason.STOP))
    assert text_of(events) == "a"


def test_last_token_at_the_limit_is_shown(byte_level: Tokenizer) -> None:
    events = read(decoder(byte_level), outputs(ids(byte_level, "a b")))
    assert (text_of(events), finish_of(events).reason) == ("a b", FinishReason.LENGTH)


@given(text=st.text("xyz", max_size=12), width=st.integers(1, 5), interval=st.integers(1, 4))
def test_stop_string_ends_the_choice_however_tokens_arrive(
    byte_level: Tokenizer, text: str, width: int, interval: int
) -> None:
    token_ids = ids(byte_level, text + "STOP and more")
    grouped = [Output("r", token_ids[i : i + width]) for i in range(0, len(token_ids), width)]
    events = read(decoder(byte_level, stop=("STOP",), stream_interval=interval), grouped)
    end = finish_of(events)
    assert (text_of(events), end.reason, end.stop_string) == (text, FinishReason.STOP, "STOP")
    until_match = next(n for n in range(len(token_ids) + 1) if "STOP" in byte_level.decode(token_ids[:n]))
    assert end.usage.completion_tokens == until_match


def test_beginning_of_a_stop_string_is_shown_when_the_sequence_ends(byte_level: Tokenizer) -> None:
    events = read(
        decoder(byte_level, stop=("STOP",)), outputs((*ids(byte_level, "aST"), EOS), finish=FinishReason.STOP)
    )
    assert (text_of(events), finish_of(events).stop_string) == ("aST", None)


def test_stop_string_is_not_matched_before_min_tokens(byte_level: Tokenizer) -> None:
    token_ids = ids(byte_level, "x x x x")
    events = read(decoder(byte_level, stop=("x",), min_tokens=len(token_ids) - 1), outputs(token_ids))
    assert text_of(events) == byte_level.decode(token_ids)[:-1]
    assert finish_of(events).stop_string == "x"


def test_stream_interval_merges_tokens(byte_level: Tokenizer) -> None:
    token_ids = tuple(byte_level.encode(letter, add_special_tokens=False)[0] for letter in "abcdefg")
    events = read(decoder(byte_level, stream_interval=3), outputs(token_ids))
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["abc", "def", "g"]


def test_unfinished_character_becomes_visible_at_the_end(sentencepiece: Tokenizer) -> None:
    token_ids = ids(sentencepiece, "🦖")[1:-1]
    events = read(decoder(sentencepiece), outputs(token_ids))
    assert text_of(events) == "\ufffd"


def test_echo_comes_with_the_first_text(byte_level: Tokenizer) -> None:
    events = read(decoder(byte_level, echo="Say: ", stop=("Say",)), outputs(ids(byte_level, "a")))
    assert text_of(events) == "Say: a"
    assert len(events) == 2


def test_counts_of_the_engine_are_passed_on(byte_level: Tokenizer) -> None:
    first = Output("r", ids(byte_level, "a")[:1], num_cached=2, queued_s=0.5)
    events = read(decoder(byte_level), [first, *outputs((EOS,), finish=FinishReason.STOP)])
    assert finish_of(events).usage.cached_tokens == 2
    assert finish_of(events).queued_s == 0.5


def test_logprobs_go_with_their_tokens(byte_level: Tokenizer) -> None:
    token_ids = ids(byte_level, "The fox")
    events = read(decoder(byte_level, logprobs=2), outputs((*token_ids, EOS), finish=FinishReason.STOP, logprobs=True))
    infos = [info for event in events if isinstance(event, TextDelta) for info in event.tokens]
    assert [info.token for info in infos] == [byte_level.token_text(i) for i in token_ids]
    assert [info.logprob for info in infos] == [-float(i) for i in range(len(token_ids))]
    assert all(info.top[0].bytes == info.bytes and info.top[1].logprob == -9.0 for info in infos)
    for event in events[:-1]:
        assert isinstance(event, TextDelta)
        assert event.text == "".join(info.token for info in event.tokens)


def test_bytes_of_a_split_character_are_reported_token_by_token(sentencepiece: Tokenizer) -> None:
    token_ids = ids(sentencepiece, "🦖")[1:]
    events = read(decoder(sentencepiece, logprobs=0), outputs(token_ids, logprobs=True))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert [(delta.text, delta.tokens[0].bytes) for delta in deltas] == [
        ("", b"\xf0"),
        ("", b"\x9f"),
        ("", b"\xa6"),
        ("🦖", b"\x96"),
    ]
    assert deltas[0].tokens[0].token == "\ufffd"


@pytest.mark.parametrize("interval", [1, 3])
def test_tokens_of_a_stop_string_are_not_reported(byte_level: Tokenizer, interval: int) -> None:
    letters = tuple(byte_level.encode(letter, add_special_tokens=False)[0] for letter in "abSTOPc")
    choice = decoder(byte_level, logprobs=0, stop=("STOP",), stream_interval=interval)
    events = read(choice, outputs(letters, logprobs=True))
    infos = [info for event in events if isinstance(event, TextDelta) for info in event.tokens]
    assert [info.token for info in infos] == ["a", "b"]
    assert finish_of(events).usage.completion_tokens == 6


def test_held_back_tokens_are_reported_when_their_text_is(byte_level: Tokenizer) -> None:
    letters = tuple(byte_level.encode(letter, add_special_tokens=False)[0] for letter in "aSTx")
    events = read(decoder(byte_level, logprobs=0, stop=("STOP",)), outputs(letters, logprobs=True))
    deltas = [(event.text, [info.token for info in event.tokens]) for event in events if isinstance(event, TextDelta)]
    assert deltas == [("a", ["a"]), ("STx", ["S", "T", "x"])]
