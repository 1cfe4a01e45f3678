"""Outputs of models with what the tests of other implementations expect of them, where they are at hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat.parsed import decoded, parse
from vllm_mlx.chat.formats import tool_format_names
from vllm_mlx.chat.reasoning import reasoning_format_names

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
OTHER_NAMES = {"qwenxml": "qwen3_xml"}
ARGUED = {"vllm_tool_full-0324", "smg-0108", "smg-0144"}
"""Cases that docs/design/011-output-formats.md decides otherwise."""

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")


def cases(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(CASES.glob(pattern)):
        yield from ((path.stem, case) for case in json.loads(path.read_text(encoding="utf-8")))


def format_of(case: dict[str, Any], names: tuple[str, ...]) -> str | None:
    said = case["parser"] if isinstance(case["parser"], list) else [case["parser"]]
    return next((OTHER_NAMES.get(name, name) for name in said if OTHER_NAMES.get(name, name) in names), None)


def schemas(case: dict[str, Any]) -> dict[str, Any]:
    tools = case.get("tools") or (case.get("request") or {}).get("tools") or ()
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def stripped(text: str | None) -> str:
    return (text or "").strip()


def pieces_of(case: dict[str, Any]) -> list[str]:
    return case.get("chunks") or [case.get("start", "") + (case["model_output"] or "") + case.get("end", "")]


def calls_are_right(case: dict[str, Any], name: str) -> bool:
    parsed, expected = parse(pieces_of(case), tools=name, schemas=schemas(case)), case["expected"]
    if isinstance(expected, list) or "name" in expected:
        wanted = expected if isinstance(expected, list) else [expected]
        return parsed.values == [(call["name"], call["arguments"]) for call in wanted]
    if "n_calls" in expected:
        return partly_right(parsed.values, parsed.content, expected)
    calls = [(call["name"], call.get("arguments_json", decoded(call["arguments"]))) for call in expected["tool_calls"]]
    return (stripped(parsed.content), parsed.values) == (stripped(expected["content"]), calls)


def partly_right(values: list[tuple[str, Any]], content: str, expected: dict[str, Any]) -> bool:
    if len(values) != expected["n_calls"]:
        return False
    for index, call in expected["calls"].items():
        name, arguments = values[int(index)]
        if call.get("name", name) != name:
            return False
        for path, value in call.get("args", ()):
            if at(arguments, path) != value:
                return False
    return not expected.get("content") or stripped(content) == stripped(expected["content"])


def at(value: Any, path: list[Any]) -> Any:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return "nothing there"
    return value


def reasoning_is_right(case: dict[str, Any], name: str) -> bool:
    kwargs = case.get("chat_template_kwargs")
    is_off = isinstance(kwargs, dict) and kwargs.get("enable_thinking") is False
    parsed = parse(pieces_of(case), reasoning=name, prompt_tail="" if is_off else None)
    expected = tuple(stripped(case["expected"][key]) for key in ("reasoning", "content"))
    return (stripped(parsed.reasoning), stripped(parsed.content)) == expected


def check(pattern: str, names: tuple[str, ...], is_right: Any) -> None:
    passed, total, wrong = Counter[tuple[str, str]](), Counter[tuple[str, str]](), []
    for source, case in cases(pattern):
        name = format_of(case, names)
        agreement = str(case.get("agreement") or "single")
        total[source, agreement] += 1
        if name is not None and is_right(case, name):
            passed[source, agreement] += 1
        elif agreement == "confirmed" and case["id"] not in ARGUED:
            wrong.append(case["id"])
    for key, count in sorted(total.items()):
        print(f"{key[0]:24} {key[1]:10} {passed[key]:4} of {count}")
    assert total
    assert wrong == []


def test_confirmed_calls_are_found() -> None:
    check("*_tool*.json", tool_format_names(), calls_are_right)


def test_confirmed_reasoning_is_found() -> None:
    check("*_reasoning*.json", reasoning_format_names(), reasoning_is_right)
