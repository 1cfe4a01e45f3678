"""`LLM`, over the demo model in an engine process."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import vllm_mlx
from vllm_mlx import SamplingParams
from vllm_mlx.core.errors import ConfigError, InvalidRequest, ModelError
from vllm_mlx.core.messages import FinishReason

if TYPE_CHECKING:
    from vllm_mlx import LLM

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_answers(demo_llm: LLM) -> None:
    [output] = demo_llm.chat(QUESTION, GREEDY)
    assert "Paris" in output.text
    assert output.prompt == QUESTION
    assert output.outputs[0].finish_reason is FinishReason.STOP
    assert output.usage.prompt_tokens > 10
    assert 0 < output.usage.completion_tokens <= 8


def test_tools_are_shown_to_a_model_whose_template_knows_none(demo_llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather of a city."}}
    [plain] = demo_llm.chat(QUESTION, GREEDY)
    [output] = demo_llm.chat(QUESTION, GREEDY, tools=[tool])
    assert output.usage.prompt_tokens > plain.usage.prompt_tokens + 50
    assert output.text or output.outputs[0].tool_calls
    assert output.outputs[0].reasoning == ""


def test_wrong_tool_is_named(demo_llm: LLM) -> None:
    with pytest.raises(InvalidRequest) as caught:
        demo_llm.chat(QUESTION, GREEDY, tools=[{"type": "function", "function": {}}])
    assert caught.value.param == "tools.0.function.name"


def test_batch_gives_the_answers_of_single_calls_in_order(demo_llm: LLM) -> None:
    prompts = ["The capital of France is", "1, 2, 3, 4,", "Once upon a time"]
    single = [demo_llm.generate(prompt, GREEDY)[0].text for prompt in prompts]
    assert [output.text for output in demo_llm.generate(prompts, GREEDY)] == single
    assert len(set(single)) == 3


def test_stream_is_the_same_text_in_pieces(demo_llm: LLM) -> None:
    chunks = list(demo_llm.stream(QUESTION, GREEDY))
    assert "".join(chunk.text for chunk in chunks) == demo_llm.chat(QUESTION, GREEDY)[0].text
    assert len(chunks) > 3
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].usage is not None


def test_stream_of_text(demo_llm: LLM) -> None:
    text = "".join(chunk.text for chunk in demo_llm.stream("1, 2, 3, 4,", GREEDY))
    assert text == demo_llm.generate("1, 2, 3, 4,", GREEDY)[0].text


def test_closed_stream_leaves_nothing_running(demo_llm: LLM) -> None:
    stream = demo_llm.stream("Once", SamplingParams(max_tokens=4000, ignore_eos=True))
    assert next(stream).finish_reason is None
    stream.close()
    assert demo_llm.generate("Hello", GREEDY)[0].text


def test_each_prompt_has_its_own_sampling(demo_llm: LLM) -> None:
    short, long = demo_llm.generate(["A", "A"], [GREEDY.replace(max_tokens=1), GREEDY.replace(max_tokens=4)])
    assert (short.usage.completion_tokens, long.usage.completion_tokens) == (1, 4)
    with pytest.raises(InvalidRequest, match="2 prompts but 1 sampling"):
        demo_llm.generate(["A", "A"], [GREEDY])


def test_token_ids_are_a_prompt(demo_llm: LLM) -> None:
    [output] = demo_llm.generate([504, 3575, 282, 4649, 314], GREEDY)
    assert output.usage.prompt_tokens == 5
    assert len(demo_llm.generate([[504, 3575], [282, 4649]], GREEDY)) == 2


def test_several_choices_and_logprobs(demo_llm: LLM) -> None:
    sampling = SamplingParams(n=3, seed=1, max_tokens=6, logprobs=2, ignore_eos=True)
    [output] = demo_llm.generate(["Once upon a time"], sampling)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert len({one.text for one in output.outputs}) > 1
    for one in output.outputs:
        assert len(one.tokens) == 6
        assert all(len(token.top) == 2 and token.logprob <= 0 for token in one.tokens)


def test_stop_may_be_one_string(demo_llm: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=40, stop="7")  # type: ignore[arg-type]
    [output] = demo_llm.generate("1, 2, 3, 4,", sampling)
    assert output.outputs[0].stop_string == "7"
    assert output.text.rstrip().endswith("6,")


def test_error_in_one_prompt_names_the_field(demo_llm: LLM) -> None:
    with pytest.raises(InvalidRequest) as caught:
        demo_llm.generate(["fine", ""], GREEDY)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest) as caught:
        demo_llm.chat([{"role": "nobody", "content": "?"}], GREEDY)
    assert caught.value.param == "messages.0.role"
    assert demo_llm.generate("fine", GREEDY)[0].text


def test_info_describes_the_model(demo_llm: LLM) -> None:
    assert demo_llm.info.max_model_len == 8192


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seq": 3}, "unknown setting max_num_seq; did you mean max_num_seqs?"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1."),
        ({"max_num_seqs": "many"}, "--max-num-seqs: 'many' is not a whole number"),
    ],
)
def test_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        vllm_mlx.LLM("demo", **settings)
    assert caught.value.message == message


def test_unknown_model_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        vllm_mlx.LLM("./no-such-model")


SCRIPT = """
from vllm_mlx import LLM, SamplingParams
llm = LLM("demo", engine="thread")
print(llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4))[0].text)
llm.close()
llm.close()
try:
    llm.generate("again")
except RuntimeError as error:
    print(error)
"""


def test_script_with_a_thread_engine_ends_by_itself() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stdout.splitlines()[-1] == "This LLM is closed."


def test_stream_may_end_after_the_model_is_closed() -> None:
    with vllm_mlx.LLM("demo") as llm:
        stream = llm.stream("Once", SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)
    stream.close()
    assert list(stream) == []


def test_script_that_forgets_to_close_ends_and_leaves_no_engine() -> None:
    script = (
        "from vllm_mlx import LLM\n"
        "llm = LLM('demo')\n"
        "import os, subprocess\n"
        "print(subprocess.run(['pgrep', '-P', str(os.getpid()), '-f', 'vllm_mlx.cli.engine'],"
        " capture_output=True, text=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    [pid] = done.stdout.split()
    alive = subprocess.run(["ps", "-p", pid, "-o", "stat="], capture_output=True, text=True, check=False).stdout
    assert alive.strip() in ("", "Z")


def test_package_offers_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        _ = vllm_mlx.NoSuchThing
