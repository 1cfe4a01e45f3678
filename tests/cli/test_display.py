"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import threading

from vllm_mlx.cli.display import Display


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_without_a_terminal_are_few() -> None:
    stream = io.StringIO()
    with Display(stream) as show:
        for percent in range(101):
            show("Downloading weights", percent / 100)
        show("Loading")
        show("Loading")
    assert stream.getvalue().splitlines() == [
        "Downloading weights 0%",
        "Downloading weights 25%",
        "Downloading weights 50%",
        "Downloading weights 75%",
        "Downloading weights 100%",
        "Loading",
    ]


def test_text_is_shown_on_a_terminal_and_gone_afterwards(monkeypatch: object) -> None:
    stream = Terminal()
    with Display(stream) as show:
        show("Downloading [weights]", 0.5)
    drawn = stream.getvalue()
    assert "Downloading [weights]" in drawn
    assert "\x1b[2K" in drawn


def test_closed_display_can_show_again() -> None:
    stream = Terminal()
    show = Display(stream)
    show("first", 0.1)
    show.close()
    show("second")
    show.close()
    assert "second" in stream.getvalue()


def test_progress_from_many_threads() -> None:
    stream = io.StringIO()
    show = Display(stream)
    threads = [threading.Thread(target=show, args=(f"file {i}", 0.0)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stream.getvalue().splitlines()) == [f"file {i} 0%" for i in range(8)]
