"""The conversation in the terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from vllm_mlx.cli.chat import _Conversation
from vllm_mlx.core.sampling import SamplingParams

if TYPE_CHECKING:
    from vllm_mlx import LLM


@pytest.fixture
def brief_llm(demo_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Whose answers are cut short, where it does not matter what they say."""
    stream, brief = demo_llm.stream, SamplingParams(temperature=0.0, max_tokens=4)
    monkeypatch.setattr(demo_llm, "stream", lambda messages: stream(messages, brief))
    return demo_llm


@pytest.fixture
def talk(demo_llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Feed lines to a conversation; returns exit code, standard output and standard error."""

    def run(*lines: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = _Conversation(demo_llm, "demo", is_terminal=False).run()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_question_from_a_pipe_is_answered(talk) -> None:
    code, out, err = talk("What is the capital of France?")
    assert (code, err) == (0, "")
    assert "Paris" in out


def test_earlier_turns_are_remembered_until_cleared(talk, brief_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    stream = brief_llm.stream

    def watched(messages):
        seen.append(len(messages))
        return stream(messages)

    monkeypatch.setattr(brief_llm, "stream", watched)
    code, _, _ = talk("Say yes.", "Say no.", "/clear", "Say maybe.", "/exit", "never asked")
    assert code == 0
    assert seen == [1, 3, 1]


def test_help_and_unknown_commands(talk) -> None:
    code, out, err = talk("/help", "/halp", "")
    assert code == 0
    assert "/clear" in out
    assert err == "Unknown command /halp; /help shows what there is.\n"


def test_refused_question_is_reported_and_forgotten(talk, brief_llm: LLM) -> None:
    code, out, err = talk("word " * 20_000, "What is the capital of France?")
    assert code == 1
    assert err.startswith("vllm-mlx: error: ")
    assert "maximum context length" in err
    assert out.strip()


def test_interrupt_stops_the_answer_only(talk, brief_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = brief_llm.stream
    interrupted = iter([True, False])

    def interrupting(messages):
        stop = next(interrupted)
        for chunk in stream(messages):
            yield chunk
            if stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(brief_llm, "stream", interrupting)
    code, out, _ = talk("Tell me a story.", "What is the capital of France?")
    assert code == 0
    first, rest = out.split("[stopped]")
    assert first.strip()
    assert rest.strip()
