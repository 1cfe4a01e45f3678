"""Whole runs against servers that answer as they are told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_server import (
    CHUNKED,
    DONE,
    END,
    HANG_UP,
    Action,
    Request,
    ScriptedServer,
    chunk,
    delta,
    usage,
    whole,
    words,
)

from vllm_mlx.bench.envelope import CapacityOptions, Objectives
from vllm_mlx.bench.options import Questions, RunOptions, SweepOptions, Target
from vllm_mlx.bench.prompts import load_set, of_mix, of_words
from vllm_mlx.bench.report import Report, notes
from vllm_mlx.bench.run import CapacityPlan, Plan, SweepPlan, WorkloadPlan, execute
from vllm_mlx.bench.server import ServerUnusable
from vllm_mlx.bench.session import Silent
from vllm_mlx.bench.workload import load_workload


def run(server: ScriptedServer, plan: Plan, **options: Any) -> Report:
    questions = Questions(**{"max_tokens": 4, **options.pop("questions", {})})
    target = Target(url=server.url, timeout_s=options.pop("timeout_s", 10.0), **options.pop("target", {}))
    outcome = execute(RunOptions(target=target, questions=questions, seed=1, **options), plan, progress=Silent())
    assert not outcome.is_interrupted
    assert outcome.report is not None
    return outcome.report


def sweep(**options: Any) -> SweepPlan:
    defaults = {"prompt_sets": (of_words(8),), "concurrencies": (2,), "warmup": 0, "repetitions": 1}
    return SweepPlan(SweepOptions(**(defaults | options)))


def good(_: Request) -> list[Action]:
    return words("one", " two", " three", tail=[usage(12, 3)])


# ---- the prompt sweep ----


def test_every_combination_is_a_row(scripted) -> None:
    server = scripted(good)
    plan = sweep(prompt_sets=(of_words(8), load_set("short", flag="-")), concurrencies=(1, 2), repetitions=2)
    found = run(server, plan, questions={"thinking": (True, False), "extra_bodies": ({}, {"top_k": 3})})
    combinations = {
        (
            row["prompt_set"],
            row["concurrency"],
            row["enable_thinking"],
            json.dumps(row["extra_body"]),
            row["repetition"],
        )
        for row in found.rows
    }
    assert len(found.rows) == len(combinations) == 2 * 2 * 2 * 2 * 2
    assert len(found.document["summary"]) == 16
    assert sum(row["num_requests"] for row in found.rows) == len(server.asked)
    assert {row["failures"] for row in found.rows} == {0}
    assert plan.has_succeeded()


def test_request_holds_what_was_asked_for(scripted) -> None:
    server = scripted(good)
    questions = {
        "max_tokens": 9, "temperature": 0.5, "ignore_eos": True, "thinking": (False,),
        "extra_bodies": ({"top_k": 3, "stream_options": None},),
    }  # fmt: skip
    run(server, sweep(concurrencies=(1,), system_prompt="Be brief."), questions=questions)
    [body] = server.asked
    system, user = body.pop("messages")
    assert (system, user["role"]) == ({"role": "system", "content": "Be brief."}, "user")
    assert body == {
        "model": "scripted", "max_tokens": 9, "temperature": 0.5, "stream": True, "ignore_eos": True, "top_k": 3,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


def test_text_completions_endpoint(scripted) -> None:
    server = scripted(
        lambda _: [CHUNKED, chunk(b'data: {"choices":[{"text":"x","finish_reason":"stop"}]}\n\n' + DONE), END]
    )
    found = run(server, sweep(concurrencies=(1,)), target={"endpoint": "completions"}, questions={"temperature": None})
    [body] = server.asked
    assert [request.path for request in server.requests if request.method == "POST"] == ["/v1/completions"]
    assert len(body.pop("prompt").split()) == 8
    assert body == {"model": "scripted", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    assert found.rows[0]["failures"] == 0


def test_warm_up_is_not_measured_and_prompts_never_repeat(scripted) -> None:
    server = scripted(good)
    found = run(server, sweep(concurrencies=(2,), warmup=2, repetitions=3))
    assert len(server.asked) == 2 * (2 + 3)
    assert sum(row["num_requests"] for row in found.rows) == 6
    assert len({body["messages"][0]["content"] for body in server.asked}) == 10


def test_concurrency_bounds_what_is_open(scripted) -> None:
    server = scripted(lambda _: words("a", "b", wait_s=0.02))
    run(server, sweep(concurrencies=(3,), num_requests=9))
    assert server.max_open == 3


def test_mix_is_sent_whole_and_a_rate_needs_no_clients(scripted) -> None:
    server = scripted(good)
    found = run(server, sweep(prompt_sets=(of_mix([(1, 50), (4, 5)]),), concurrencies=(None,), rates=(math.inf,)))
    assert sorted(len(body["messages"][0]["content"].split()) for body in server.asked) == [5, 5, 5, 5, 50]
    assert (found.rows[0]["concurrency"], found.rows[0]["request_rate"]) == (None, "inf")


def test_every_way_to_fail_is_counted_under_its_name(scripted) -> None:
    scripts: Iterator[list[Action]] = iter(
        [
            good(None),
            whole(500, {"error": {"message": "out of memory"}}),
            whole(503, b"busy"),
            [CHUNKED, delta(content="x"), HANG_UP],
            [CHUNKED, delta(content="x"), chunk(DONE), END],
            [CHUNKED, chunk(b'data: {"error": {"message": "engine died"}}\n\n'), END],
            [CHUNKED, chunk(b"data: nonsense\n\n"), END],
            [HANG_UP],
            [CHUNKED, delta(content="x"), 5.0],
        ]
    )
    plan = sweep(concurrencies=(1,), num_requests=9, include_requests=True)
    found = run(scripted(lambda _: next(scripts)), plan, timeout_s=0.2)
    [row] = found.rows
    assert row["failure_kinds"] == {
        "status 500": 1, "status 503": 1, "broken_stream": 2, "error_event": 1, "malformed": 1, "connection": 1,
        "timeout": 1,
    }  # fmt: skip
    assert (row["num_requests"], row["failures"], row["validated"]) == (9, 8, False)
    assert row["throughput_tps"] == pytest.approx(3 / row["wall_s"])
    assert [request["message"] for request in row["requests"]][1] == "out of memory"
    assert any(line.startswith("failures (8 words, concurrency 1): ") for line in notes(found.document))
    assert plan.has_succeeded()


def test_run_without_any_answer_has_not_succeeded(scripted) -> None:
    plan = sweep()
    run(scripted(lambda _: [HANG_UP]), plan)
    assert not plan.has_succeeded()


def test_server_without_usage_is_counted_by_chunks_and_says_so(scripted) -> None:
    def answer(request: Request) -> list[Action]:
        return words("a", "b") if request.body["stream"] else whole(200, {"usage": {"prompt_tokens": 33}})

    server = scripted(answer)
    found = run(server, sweep(warmup=1))
    [row] = found.rows
    assert (row["tokens_counted_by"], row["completion_tokens"], row["prompt_tokens"]) == ("chunks", 2, 33)
    [counting] = [body for body in server.asked if not body["stream"]]
    assert (counting["max_tokens"], "stream_options" in counting) == (1, False)
    assert any("chunks with text are counted" in line for line in notes(found.document))


def test_prompts_are_not_counted_where_that_is_unwanted(scripted) -> None:
    server = scripted(lambda _: words("a"))
    found = run(server, sweep(warmup=1, skip_token_count=True))
    assert all(body["stream"] for body in server.asked)
    assert found.rows[0]["prompt_tokens"] is None


def test_facts_memory_and_counters_come_from_the_server(scripted) -> None:
    counts = iter(range(0, 100, 10))

    class Pages(dict):
        def get(self, path: str, default: Any = None) -> Any:
            if path == "/metrics":
                n = next(counts)
                text = f"# TYPE x_total counter\nx_total {n}\n# TYPE x_cached_prompt_tokens_total counter\n"
                return 200, f"{text}x_cached_prompt_tokens_total {2 * n}\n".encode()
            return super().get(path, default)

    pages = Pages(
        {
            "/health": (200, {"engine_type": "batched", "engine": {"device": "M9"}, "mtp": {"enabled": True}}),
            "/v1/status": (503, {"mtp": {"enabled": False}, "metal": {"peak_memory_gb": 3.5}}),
        }
    )
    found = run(scripted(good, pages=pages), sweep(repetitions=2), tag="t", overrides={"chip": "M10", "rack": "7"})
    row = found.rows[1]
    expected = {
        "chip": "M10", "rack": "7", "tag": "t", "engine_type": "batched", "mtp_enabled": False, "metal_peak_gb": 3.5,
        "tokens_saved": 20, "metrics_delta": {"x_total": 10, "x_cached_prompt_tokens_total": 20}, "cache_hits": None,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert "memory_gb" not in row
    assert "rack" in found.fields
    assert "server: x_total +20" in notes(found.document)


def test_metrics_are_left_alone_where_that_is_unwanted(scripted) -> None:
    server = scripted(good, pages={"/metrics": (200, b"# TYPE x_total counter\nx_total 1\n")})
    run(server, sweep(), scrape_metrics=False)
    assert "/metrics" not in [request.path for request in server.requests]


def test_cache_is_emptied_before_each_configuration_where_that_is_offered(scripted) -> None:
    offers = scripted(good, pages={"DELETE /v1/cache": (200, {})})
    lacks = scripted(good)
    for server, times in ((offers, 3), (lacks, 1)):
        found = run(server, sweep(concurrencies=(1, 2, 3), repetitions=2))
        assert [request.method for request in server.requests].count("DELETE") == times
        assert {row["failures"] for row in found.rows} == {0}


@pytest.mark.parametrize(
    ("page", "words"),
    [((401, {"error": {"message": "no key"}}), "401: no key"), ((200, {"data": []}), "name one with --model")],
)
def test_server_that_cannot_be_asked_is_an_error(scripted, page: Any, words: str) -> None:
    server = scripted(good, pages={"/v1/models": page})
    with pytest.raises(ServerUnusable, match=words):
        run(server, sweep())


def test_server_without_a_list_of_models_is_asked_for_the_given_one(scripted) -> None:
    server = scripted(good, pages={"/v1/models": (404, {})})
    run(server, sweep(concurrencies=(1,)), target={"model": "mine"})
    assert server.asked[0]["model"] == "mine"


# ---- workloads ----


def test_workload_records_answers_and_what_is_wrong_with_them(scripted, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    messages = [{"role": "user", "content": "Hi"}]
    cases = [
        {"id": "good", "messages": messages, "checks": {"required_regex": ["one two"]}, "tags": ["a"]},
        {"id": "bad", "messages": messages, "checks": {"json": True}},
        {"id": "slow", "messages": messages, "policy_timeout_ms": 0.001},
    ]
    path.write_text(json.dumps({"name": "w", "cases": cases, "defaults": {"cache_policy": "before-case"}}))
    server = scripted(good, pages={"DELETE /v1/cache": (200, {})})
    plan = WorkloadPlan(load_workload(path), repetitions=2, warmup=1, include_content=True)
    found = run(server, plan)
    records = found.document["records"]
    assert [(r["case_id"], r["repetition"], r["ok"]) for r in records] == [
        ("good", 1, True), ("bad", 1, False), ("slow", 1, False),
        ("good", 2, True), ("bad", 2, False), ("slow", 2, False),
    ]  # fmt: skip
    assert records[1]["quality"]["issues"] == ["the text is not JSON"]
    assert records[2]["policy"] == {"timeout_ms": 0.001, "within_timeout": False}
    assert records[2]["quality"]["ok"] is True
    assert records[0]["quality"]["content"] == "one two three"
    assert records[0]["cache_reset"] == {"policy": "before-case", "result": "cleared"}
    assert [request.method for request in server.requests].count("DELETE") == 6
    assert len(server.asked) == 9
    assert found.document["summary"] == {"records": 6, "ok": 2, "quality_ok": 4, "over_policy_timeout": 2}
    assert found.rows[0]["quality_ok"] is True
    assert found.rows[0]["content_preview"] == "one two three"
    assert not plan.has_succeeded()


# ---- the capacity envelope ----


class CachingServer:
    """Remembers prompts: answers with how much of a prompt it has seen, word for word, from its beginning."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, request: Request) -> list[Action]:
        prompt = request.body["messages"][0]["content"].split()
        cached = max((_common(prompt, other) for other in self.seen), default=0)
        self.seen.append(prompt)
        return words("a", "b", tail=[usage(len(prompt) + 10, 2, cached)])


def _common(one: list[str], other: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def capacity(**options: Any) -> CapacityPlan:
    defaults = {"concurrencies": (1, 2), "prompt_tokens": (100,), "output_tokens": (2,), "repetitions": 2, "warmup": 1}
    return CapacityPlan(CapacityOptions(**(defaults | options)))


def test_cache_modes_do_what_they_say(scripted) -> None:
    found = run(scripted(CachingServer()), capacity())
    cells = {(c["cache_mode"], c["concurrency"]): c for c in found.document["cells"]}
    assert len(cells) == 8
    assert {cell["verdict"] for cell in cells.values()} == {"sustainable"}
    assert cells["cold", 2]["cached_fraction"] < 0.1
    assert cells["prefix-miss", 2]["cached_fraction"] < 0.1
    assert cells["prefix-hit", 2]["cached_fraction"] > 0.7
    assert cells["warm", 2]["cached_fraction"] > cells["prefix-hit", 2]["cached_fraction"]
    assert cells["cold", 2]["num_requests"] == 4
    assert {cell["prompt_tokens"] for cell in cells.values()} == {100}
    assert [line["max_sustainable_concurrency"] for line in found.document["summary"]] == [2, 2, 2, 2]
    assert {event["action"] for event in found.document["cache_events"]} == {
        "reset", "same prompts sent before", "same beginning sent before",
    }  # fmt: skip


def test_slow_cells_are_not_sustainable(scripted) -> None:
    limit = Objectives(max_p95_e2e_ms=1e-3)
    found = run(scripted(CachingServer()), capacity(objectives=limit, cache_modes=("cold",)))
    assert {cell["verdict"] for cell in found.document["cells"]} == {"exceeded"}
    assert found.document["summary"][0]["max_sustainable_concurrency"] is None


def test_baseline_with_other_output_is_noticed(scripted) -> None:
    server, same, other = scripted(CachingServer()), scripted(CachingServer()), scripted(lambda _: words("c"))
    for baseline, equal in ((same, True), (other, False)):
        plan = capacity(baseline_url=baseline.url, cache_modes=("cold",), concurrencies=(1,))
        [cell] = run(server, plan).document["cells"]
        assert cell["baseline_equal"] is equal
        assert cell["sustainable"] is equal


def test_artifact_names_its_workload_by_a_hash(scripted) -> None:
    server = scripted(CachingServer())
    one, same, other = (
        run(server, capacity(cache_modes=("cold",), concurrencies=(1,), repetitions=n)).document for n in (1, 1, 2)
    )
    assert one["workload_hash"] == same["workload_hash"] != other["workload_hash"]
    assert one["provenance_hash"] == other["provenance_hash"]
    assert {"kind", "schema_version", "measurement", "samples", "summary", "baseline_url"} <= set(one)
