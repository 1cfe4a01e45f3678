"""The client's HTTP: whatever a server does ends as an answer or as one of three errors."""

from __future__ import annotations

import socket

import pytest
from scripted_server import CHUNKED, END, HANG_UP, chunk, whole

from vllm_mlx.bench.http import BrokenOff, ConnectionFailed, HttpClient, Origin, TimedOut, parse_origin

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://127.0.0.1:8000", Origin("127.0.0.1", 8000, False, "")),
        ("http://127.0.0.1:8000/v1/", Origin("127.0.0.1", 8000, False, "")),
        ("localhost:9", Origin("localhost", 9, False, "")),
        ("https://example.org/api/v1", Origin("example.org", 443, True, "/api")),
        ("http://[::1]:80", Origin("::1", 80, False, "")),
    ],
)
def test_base_address_is_taken_apart(url: str, origin: Origin) -> None:
    assert parse_origin(url) == origin


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host/?x=1", "http://host:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_origin(url)


def client_of(url: str, **options: object) -> HttpClient:
    return HttpClient(parse_origin(url), **options)


async def test_pieces_of_a_chunked_body_arrive_in_order(scripted) -> None:
    server = scripted(lambda _: [CHUNKED, chunk(b"one "), 0.02, chunk(b"two "), chunk(b"three"), END])
    pieces: list[bytes] = []
    answer = await client_of(server.url).request("POST", "/x", body=b'{"a":1}', on_data=pieces.append)
    assert (answer.status, answer.body) == (200, b"")
    assert pieces[0] == b"one "
    assert b"".join(pieces) == b"one two three"
    assert server.asked == [{"a": 1}]


async def test_body_that_ends_with_the_connection_is_whole(scripted) -> None:
    """HTTP/1.0, as Python's own server speaks it."""
    server = scripted(lambda _: [b"HTTP/1.0 200 OK\r\n\r\n", b"some ", 0.01, b"text"])
    assert (await client_of(server.url).request("POST", "/x", body=b"{}")).body == b"some text"


async def test_body_of_an_error_is_not_taken_for_data(scripted) -> None:
    server = scripted(lambda _: whole(503, {"error": "busy"}, head="retry-after: 2\r\n"))
    pieces: list[bytes] = []
    answer = await client_of(server.url).request("POST", "/x", body=b"{}", on_data=pieces.append)
    assert (answer.status, answer.body, pieces) == (503, b'{"error": "busy"}', [])
    assert answer.headers["retry-after"] == "2"


async def test_key_and_base_path_are_sent(scripted) -> None:
    server = scripted(lambda _: whole(200, {}))
    await client_of(f"{server.url}/base/v1", api_key="secret").request("POST", "/v1/x", body=b"{}")
    assert server.requests[0].path == "/base/v1/x"
    assert server.requests[0].headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "script",
    [
        [CHUNKED, chunk(b"text"), HANG_UP],
        [CHUNKED, chunk(b"text")],
        [CHUNKED, b"no size\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort"],
    ],
    ids=["aborted", "closed without the last chunk", "no chunk", "shorter than said"],
)
async def test_answer_that_breaks_off_is_told_from_a_whole_one(scripted, script) -> None:
    server = scripted(lambda _: script)
    with pytest.raises(BrokenOff):
        await client_of(server.url).request("POST", "/x", body=b"{}")


@pytest.mark.parametrize("script", [[HANG_UP], [], [b"HTTP/1.1 200"], [b"what?\r\n\r\n"]])
async def test_connection_without_an_answer_failed(scripted, script) -> None:
    server = scripted(lambda _: script)
    with pytest.raises(ConnectionFailed):
        await client_of(server.url).request("POST", "/x", body=b"{}")


async def test_refused_connection_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionFailed, match="connection refused"):
        await client_of(f"http://127.0.0.1:{port}").request("GET", "/")


@pytest.mark.parametrize("begun", [[], [CHUNKED, chunk(b"text")]])
async def test_silence_times_out(scripted, begun) -> None:
    server = scripted(lambda _: [*begun, 30.0])
    with pytest.raises(TimedOut, match=r"nothing arrived for 0\.1 s"):
        await client_of(server.url, timeout_s=0.1).request("POST", "/x", body=b"{}")


async def test_slow_answer_that_never_falls_silent_is_waited_for(scripted) -> None:
    pieces = [action for _ in range(10) for action in (0.05, chunk(b"."))]
    server = scripted(lambda _: [CHUNKED, *pieces, END])
    answer = await client_of(server.url, timeout_s=0.3).request("POST", "/x", body=b"{}")
    assert answer.body == b".........."
