"""What waits for the disk."""

from __future__ import annotations

from vllm_mlx.kv.tiers.queues import Loaded, LoadQueue, Save, SaveQueue
from vllm_mlx.kv.tiers.record import Kind

A, B, C = b"a", b"b", b"c"


def save_of(path: str, num_bytes: int) -> Save:
    return Save(path, Kind.PAGE, path.encode(), memoryview(bytes(num_bytes)))


def read_all(queue: LoadQueue, payload: bytes | None) -> list[bytes]:
    names = []
    while read := queue.start():
        names.append(read.name)
        queue.deliver(read, payload)
    return names


def test_blob_counts_until_it_is_written() -> None:
    queue = SaveQueue(100)
    queue.add(save_of("x", 30))
    queue.add(save_of("y", 20))
    current = queue.start()
    assert current is not None
    assert current.path == "x"
    assert "x" in queue
    assert queue.size_bytes == 50
    queue.finish()
    assert "x" not in queue
    assert queue.size_bytes == 20
    assert queue.clear() == 1
    assert (queue.size_bytes, queue.is_idle) == (0, True)


def test_what_is_read_comes_piece_by_piece() -> None:
    queue = LoadQueue(100)
    ticket = queue.add([A, B, A], Kind.PAGE)
    first = queue.start()
    assert first is not None
    queue.deliver(first, b"1")
    assert queue.take(ticket) == Loaded({A: b"1"}, (), is_done=False)
    assert queue.take(ticket) == Loaded({}, (), is_done=False)
    second = queue.start()
    assert second is not None
    assert queue.deliver(second, None) == [A]
    assert queue.take(ticket) == Loaded({}, (B,), is_done=True)
    assert queue.take(ticket) == Loaded({}, (), is_done=True)


def test_reading_pauses_until_something_is_taken() -> None:
    queue = LoadQueue(2)
    ticket = queue.add([A, B, C], Kind.PAGE)
    assert read_all(queue, b"x") == [A, B]
    assert queue.take(ticket).blobs == {A: b"x", B: b"x"}
    assert read_all(queue, b"x") == [C]


def test_ticket_that_is_not_taken_holds_up_nobody() -> None:
    queue = LoadQueue(1)
    queue.add([A, B], Kind.PAGE)
    other = queue.add([C, B], Kind.PAGE)
    assert read_all(queue, b"x") == [A, C]
    assert queue.take(other).blobs == {C: b"x"}
    assert read_all(queue, b"x") == [B]


def test_cancelled_ticket_frees_what_was_read() -> None:
    queue = LoadQueue(1)
    ticket = queue.add([A, B], Kind.PAGE)
    read = queue.start()
    assert read is not None
    queue.deliver(read, b"x")
    late = queue.add([C, A], Kind.PAGE)
    queue.cancel(ticket)
    assert queue.deliver(read, b"x") == []
    assert read_all(queue, b"y") == [C]
    assert queue.take(late).blobs == {C: b"y"}


def test_void_ticket_misses_what_was_not_taken() -> None:
    queue = LoadQueue(100)
    ticket = queue.add([A, B, C], Kind.PAGE)
    for payload in (b"1", None):
        read = queue.start()
        assert read is not None
        queue.deliver(read, payload)
    running = queue.start()
    assert running is not None
    queue.void()
    assert queue.deliver(running, b"3") == []
    loaded = queue.take(ticket)
    assert (loaded.blobs, sorted(loaded.missing), loaded.is_done) == ({}, [A, B, C], True)


def test_ticket_of_nothing_is_done() -> None:
    queue = LoadQueue(1)
    assert queue.take(queue.add([], Kind.PAGE)).is_done
