"""Calls written as Python: `[f(a=1), g(b='x')]`, with literals as keyword arguments."""

from __future__ import annotations

import ast
import json
import re
import warnings
from types import MappingProxyType
from typing import Any

from vllm_mlx.chat.payloads.actions import Arguments, CallOpen, NotACall, Parsing
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet, plain

_NAME = re.compile(r"[\w.:/-]+")
_INSIDE = re.compile(r"[^\[\](){}\"'#]+")
_IN_STRING = {'"': re.compile(r'[^"\\]+'), "'": re.compile(r"[^'\\]+")}
_PAIRS = {"[": "]", "(": ")", "{": "}"}
_LEADING_ZERO = re.compile(r"(?<=[=,(\[{: ])0+(?=[0-9])")
_MAX_LENGTH = 1_000_000
_MAX_DEPTH = 64
_JSON_WORDS = MappingProxyType({"true": True, "false": False, "null": None})
_STRING = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_ODD_NAME = re.compile(rf"{_STRING}|(?P<name>[A-Za-z_][\w.]*[:/-][\w.:/-]*)(?=\()", re.DOTALL)
"""A string, or a tool's name that is none of Python's."""
_PLACEHOLDER = "odd_name_of_a_tool_"


def read_call_list(reader: Reader, tools: ToolSet) -> Parsing[None]:
    """A list of calls of known tools, from behind its `[`. Raises NotACall."""
    yield from reader.space()
    start = yield from reader.run(_NAME)
    if not start or not tools.knows(start) or (yield from reader.peek()) != "(":
        raise NotACall("a list of something else")
    rest = yield from _balanced(reader, "]")
    yield from emit_calls(f"[{start}{rest}", tools)


def read_calls_before(reader: Reader, tools: ToolSet, end: str) -> Parsing[None]:
    """Calls up to and with a mark, which does not count inside strings. Raises NotACall."""
    pieces = []
    while True:
        piece, found = yield from reader.until(end, *_IN_STRING)
        pieces.append(piece)
        if found == end:
            break
        pieces.append(found)
        pieces.append((yield from _string(reader, found)))
    yield from emit_calls("".join(pieces), tools)


def read_python_call(reader: Reader, name: str) -> Parsing[None]:
    """One call, from behind its name. Raises NotACall."""
    yield from reader.expect("(")
    rest = yield from _balanced(reader, ")")
    yield from emit_calls(f"{name}({rest}", ToolSet())


def emit_calls(text: str, tools: ToolSet) -> Parsing[None]:
    """The calls in a text that is complete: a list, or one call a line. Raises NotACall if it is anything else."""
    calls = parse_calls(text.strip())
    if not calls or not all(tools.knows(name) for name, _ in calls):
        raise NotACall("no calls of known tools")
    for name, arguments in calls:
        yield CallOpen(name)
        yield Arguments(json.dumps(arguments, ensure_ascii=False))


def parse_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments) of each call. Raises NotACall."""
    nodes: list[ast.expr] = []
    odd_names: list[str] = []

    def replaced(found: re.Match[str]) -> str:
        if found["name"] is None:
            return found[0]
        odd_names.append(found["name"])
        return f"{_PLACEHOLDER}{len(odd_names) - 1}"

    for statement in _parsed(_ODD_NAME.sub(replaced, text)).body:
        if not isinstance(statement, ast.Expr):
            raise NotACall("Python that is no call")
        value = statement.value
        nodes += value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
    calls = [_call(node) for node in nodes]
    names = {f"{_PLACEHOLDER}{i}": name for i, name in enumerate(odd_names)}
    return [(names.get(name, name), arguments) for name, arguments in calls]


def _parsed(text: str) -> ast.Module:
    if len(text) > _MAX_LENGTH:
        raise NotACall("calls that are too long")
    errors = (SyntaxError, ValueError, MemoryError, RecursionError)
    for attempt in (text, _LEADING_ZERO.sub("", text), _escaped_breaks(text)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(attempt)
        except errors:
            continue
    raise NotACall("no Python")


def _escaped_breaks(text: str) -> str:
    """Line breaks inside strings as escapes; models write them raw."""
    return re.sub(_STRING, lambda found: found[0].replace("\n", "\\n"), text, flags=re.DOTALL)


class _JsonWords(ast.NodeTransformer):
    """`true`, `false` and `null` as Python has them."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_WORDS[node.id]) if node.id in _JSON_WORDS else node


def _literal(node: ast.expr) -> Any:
    return plain(ast.literal_eval(_JsonWords().visit(node)))


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        raise NotACall("Python that is no call")
    if node.args and (node.keywords or len(node.args) > 1):
        raise NotACall("arguments without names")
    try:
        if node.args:
            arguments = _literal(node.args[0])
        else:
            arguments = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise NotACall("arguments that are no literals") from error
    if not isinstance(arguments, dict):
        raise NotACall("arguments without names")
    return ast.unparse(node.func), arguments


def _balanced(reader: Reader, end: str) -> Parsing[str]:
    """Text up to and with the bracket that closes one which was taken before."""
    open_brackets = [end]
    pieces = []
    while open_brackets:
        pieces.append((yield from reader.run(_INSIDE)))
        char = yield from reader.peek()
        if not char or char == "#":
            raise NotACall("brackets that are not closed")
        yield from reader.expect(char)
        pieces.append(char)
        if char in _IN_STRING:
            pieces.append((yield from _string(reader, char)))
        elif char in _PAIRS:
            open_brackets.append(_PAIRS[char])
            if len(open_brackets) > _MAX_DEPTH:
                raise NotACall("brackets that are nested too deeply")
        elif open_brackets.pop() != char:
            raise NotACall("brackets that do not match")
    return "".join(pieces)


def _string(reader: Reader, quote: str) -> Parsing[str]:
    """The rest of a string, with its closing quote."""
    pieces = []
    while True:
        pieces.append((yield from reader.run(_IN_STRING[quote])))
        char = yield from reader.peek()
        if not char:
            raise NotACall("a string that is not closed")
        yield from reader.expect(char)
        pieces.append(char)
        if char == quote:
            return "".join(pieces)
        escaped = yield from reader.peek()
        if escaped:
            yield from reader.expect(escaped)
            pieces.append(escaped)
