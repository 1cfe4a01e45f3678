"""Prometheus text, and what of it grows."""

from __future__ import annotations

from vllm_mlx.bench import metrics

TEXT = """\
# TYPE app_requests_total counter
app_requests_total{path="/x",code="200"} 3
app_requests_total{path="/y",code="200"} 1
# TYPE app_running gauge
app_running 7
# TYPE app_cache_hits gauge
app_cache_hits 2
# TYPE app_cache_misses gauge
app_cache_misses 4
# TYPE app_cached_prompt_tokens_total counter
app_cached_prompt_tokens_total 10
# TYPE app_ttft_seconds histogram
app_ttft_seconds_bucket{le="1"} 1
app_ttft_seconds_bucket{le="+Inf"} 2
app_ttft_seconds_sum 2.5
app_ttft_seconds_count 2
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 9
"""


def test_only_what_grows_is_read() -> None:
    assert metrics.parse(TEXT) == {
        'app_requests_total{code="200",path="/x"}': 3,
        'app_requests_total{code="200",path="/y"}': 1,
        "app_cache_hits": 2,
        "app_cache_misses": 4,
        "app_cached_prompt_tokens_total": 10,
        "app_ttft_seconds_sum": 2.5,
        "app_ttft_seconds_count": 2,
        "process_cpu_seconds_total": 9,
    }


def test_delta_is_what_happened_between() -> None:
    before = metrics.parse(TEXT)
    after = metrics.parse(TEXT.replace("tokens_total 10", "tokens_total 25").replace("hits 2", "hits 5"))
    change = metrics.delta(before, after)
    assert metrics.changed(change) == {"app_cached_prompt_tokens_total": 15, "app_cache_hits": 3}
    assert (metrics.tokens_saved(change), metrics.cache_hits(change), metrics.cache_misses(change)) == (15, 3, 0)


def test_counter_of_a_restarted_server_counts_from_zero() -> None:
    assert metrics.delta({"a_total": 10.0}, {"a_total": 4.0, "b_total": 1.0}) == {"a_total": 4.0, "b_total": 1.0}


def test_server_that_counts_no_cache_is_not_said_to() -> None:
    change = metrics.delta({"a_total": 1.0}, {"a_total": 2.0})
    assert (metrics.cache_hits(change), metrics.cache_misses(change), metrics.tokens_saved(change)) == (None,) * 3


def test_text_of_another_kind_gives_nothing() -> None:
    assert metrics.parse("<html>Not found</html>") == {}
    assert metrics.parse('{"a": 1}') == {}
