"""Open requests across engines that die: resumed, completed, or blamed."""

from __future__ import annotations

import pytest

from vllm_mlx.core.messages import Abort, FinishReason, Output, Submit, ToEngine
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.requests import MAX_DEATHS, OpenRequest, OpenRequests

LONG = 10_000


def order(request_id: str, *, max_tokens: int = 8, resume: tuple[int, ...] = ()) -> Submit:
    sampling = SamplingParams(seed=1, max_tokens=max_tokens)
    return Submit(request_id, Prompt((1, 2, 3)), sampling, resume_token_ids=resume)


def submitted(sent: list[ToEngine]) -> list[str]:
    """Ids of the requests that were submitted since the last look."""
    ids = [message.request_id for message in sent if isinstance(message, Submit)]
    sent.clear()
    return ids


def outputs_of(request: OpenRequest) -> list[Output]:
    found = []
    while not request._outputs.empty():
        found.append(request._outputs.get_nowait())
    return found


@pytest.fixture
def sent() -> list[ToEngine]:
    return []


@pytest.fixture
def requests(sent: list[ToEngine]) -> OpenRequests:
    table = OpenRequests(sent.append)
    table.engine_ready()
    return table


def test_request_waits_until_an_engine_is_ready(sent: list[ToEngine]) -> None:
    requests = OpenRequests(sent.append)
    requests.add(order("a"))
    assert not sent
    assert requests.num_unsubmitted == 1
    requests.engine_ready()
    assert submitted(sent) == ["a"]
    assert requests.num_unsubmitted == 0


def test_id_of_an_open_request_is_refused(requests: OpenRequests) -> None:
    requests.add(order("a"))
    with pytest.raises(ValueError, match="'a' is already open"):
        requests.add(order("a"))


def test_delivered_tokens_are_resumed_after_those_that_came_with_the_request(
    requests: OpenRequests, sent: list[ToEngine]
) -> None:
    requests.add(order("a", resume=(10, 11)))
    requests.deliver([Output("a", (12,)), Output("a", (13, 14))])
    requests.engine_died(LONG)
    sent.clear()
    requests.engine_ready()
    assert sent == [order("a", resume=(10, 11, 12, 13, 14))]


def test_numbers_of_the_first_start_are_kept_after_a_restart(requests: OpenRequests) -> None:
    request = requests.add(order("a"))
    requests.deliver([Output("a", (1,), num_cached=32, queued_s=0.5)])
    requests.engine_died(LONG)
    requests.engine_ready()
    requests.deliver([Output("a", (2,), num_cached=0, queued_s=9.0, finish=FinishReason.STOP)])
    assert [(o.token_ids, o.num_cached, o.queued_s) for o in outputs_of(request)] == [((1,), 32, 0.5), ((2,), 32, None)]


def test_complete_request_finishes_when_the_engine_dies(requests: OpenRequests, sent: list[ToEngine]) -> None:
    request = requests.add(order("a", max_tokens=4, resume=(9,)))
    requests.deliver([Output("a", (1, 2, 3))])
    requests.engine_died(LONG)
    assert outputs_of(request)[-1] == Output("a", finish=FinishReason.LENGTH)
    sent.clear()
    requests.engine_ready()
    assert not sent


def test_request_that_fills_the_context_finishes_when_the_engine_dies(requests: OpenRequests) -> None:
    request = requests.add(order("a"))
    requests.deliver([Output("a", (1, 2))])
    requests.engine_died(max_model_len=5)
    assert outputs_of(request)[-1].finish is FinishReason.LENGTH


def test_closed_request_is_aborted_once_and_its_late_outputs_are_dropped(
    requests: OpenRequests, sent: list[ToEngine]
) -> None:
    request = requests.add(order("a"))
    sent.clear()
    requests.remove(request)
    requests.remove(request)
    requests.deliver([Output("a", (1,))])
    assert sent == [Abort("a")]
    assert not outputs_of(request)
    assert len(requests) == 0


def test_finished_request_is_not_aborted(requests: OpenRequests, sent: list[ToEngine]) -> None:
    request = requests.add(order("a"))
    requests.deliver([Output("a", (1,), finish=FinishReason.STOP)])
    sent.clear()
    requests.remove(request)
    assert not sent


def test_abort_by_the_engine_is_an_error_for_a_caller_that_waits(requests: OpenRequests) -> None:
    request = requests.add(order("a"))
    requests.deliver([Output("a", finish=FinishReason.ABORT)])
    [output] = outputs_of(request)
    assert output.finish is FinishReason.ERROR
    assert output.message


def test_only_the_culprit_is_blamed(requests: OpenRequests, sent: list[ToEngine]) -> None:
    opened = {name: requests.add(order(name)) for name in ("a", "culprit", "b")}
    for _ in range(2):
        requests.engine_died(LONG)
        sent.clear()
        requests.engine_ready()
    # All three were there twice: they are tried one at a time.
    assert submitted(sent) == ["a"]
    requests.add(order("new"))
    assert submitted(sent) == ["new"]
    requests.deliver([Output("a", (1,))])
    assert submitted(sent) == ["culprit"]
    requests.engine_died(LONG)
    [output] = outputs_of(opened["culprit"])
    assert output.finish is FinishReason.ERROR
    assert f"stopped {MAX_DEATHS} times" in (output.message or "")
    requests.engine_ready()
    assert submitted(sent) == ["a", "b", "new"]


def test_next_suspect_is_tried_when_the_one_before_is_closed(requests: OpenRequests, sent: list[ToEngine]) -> None:
    first, _ = requests.add(order("a")), requests.add(order("b"))
    for _ in range(2):
        requests.engine_died(LONG)
        sent.clear()
        requests.engine_ready()
    requests.remove(first)
    assert submitted(sent) == ["a", "b"]


def test_request_that_makes_progress_is_never_blamed(requests: OpenRequests) -> None:
    request = requests.add(order("a", max_tokens=100))
    for token in range(10):
        requests.engine_died(LONG)
        requests.engine_ready()
        requests.deliver([Output("a", (token,))])
    assert not request.is_finished


def test_deaths_while_waiting_do_not_count(requests: OpenRequests) -> None:
    request = requests.add(order("a"))
    for _ in range(10):
        requests.engine_died(LONG)
    assert request.num_deaths == 1
