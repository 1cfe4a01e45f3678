"""How the measurements of the prefix cache read recorded requests, and what their tables say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import prefix_recorded

    found: ModuleType = prefix_recorded
    return found


def test_tools_and_system_text_become_the_first_message(scripts: ModuleType) -> None:
    body = {
        "tools": [{"name": "read"}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Read it."}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
        ],
    }
    assert scripts.plain_messages(body) == [
        {"role": "system", "content": 'Be brief.\n\n[{"name": "read"}]'},
        {"role": "user", "content": "Read it."},
        {"role": "assistant", "content": '[{"id": "c1"}]'},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]


def test_blocks_of_the_other_dialect_keep_their_size(scripts: ModuleType) -> None:
    body = {
        "system": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}],
        "messages": [{"role": "user", "content": [{"type": "tool_result", "content": "done"}]}],
    }
    assert scripts.plain_messages(body) == [
        {"role": "system", "content": "One.\nTwo.\n\n"},
        {"role": "user", "content": '{"type": "tool_result", "content": "done"}'},
    ]


@pytest.mark.usefixtures("scripts")
def test_percentages_are_of_the_cold_time_of_the_same_round() -> None:
    import prefix_tables

    found = {"cold": [10.0, 20.0, 40.0], "repeat": [1.0, 1.0, 1.0]}
    assert prefix_tables.percent_of_cold(found, "repeat") == 5
    assert prefix_tables.percent_of_cold(found, "restart") is None
    assert "| ours | 20,000 | 1,000 | **5.0 %** |" in prefix_tables.table({"ours": found}, first="server")


@pytest.mark.usefixtures("scripts")
def test_a_folder_is_written_once_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefix_tables

    monkeypatch.setattr(prefix_tables, "QUIET_S", 0.1)
    (tmp_path / "a").write_bytes(bytes(7))
    assert prefix_tables.wait_written(tmp_path) == 7
    assert prefix_tables.wait_written(tmp_path / "absent") == 0


@pytest.mark.usefixtures("scripts")
def test_turns_are_compared_with_the_same_turns_of_peers() -> None:
    import agent_turns
    from prefix_servers import Answered

    def conversation(*seconds: float) -> list[Answered]:
        return [Answered(second, 100 * turn, 90 * turn) for turn, second in enumerate(seconds, 1)]

    found = {"ours": [conversation(1, 0.1)], "mlx-lm": [conversation(2, 0.2), conversation(2, 0.2)]}
    lines = agent_turns.table(found, 2).splitlines()
    assert lines[2] == "| ours | 1000 | 90 of 100 | 100 | 180 of 200 |"
    assert lines[3] == "| mlx-lm | 2000 (0.50x) | 90 of 100 | 200 (0.50x) | 180 of 200 |"
