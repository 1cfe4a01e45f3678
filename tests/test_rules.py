"""Rules about the code itself that neither the linter nor the type checker knows."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.core.config import Config, docs, flag

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_mlx"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
# path below the package -> why it may be longer
LONG_FILES: dict[str, str] = {}

BROAD_EXCEPT_FILES = {"engine/engine.py", "api/errors.py", "cli/main.py"}
MUTABLE_CALLS = {"dict", "list", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"}
HEAVY_MODULES = ("torch", "transformers", "mlx", "mlx_lm", "cv2", "gradio", "fastapi", "uvicorn", "numpy", "tokenizers")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


TREES = {name_of(path): tree_of(path) for path in SOURCES}
NUM_LINES = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}


def test_files_stay_short() -> None:
    too_long = {name: lines for name, lines in NUM_LINES.items() if lines > MAX_FILE_LINES}
    assert too_long.keys() == LONG_FILES.keys(), too_long


def test_functions_stay_short() -> None:
    too_long = [
        f"{name}:{node.lineno} {node.name}: {length_of(node)} lines"
        for name, node in every(ast.FunctionDef, ast.AsyncFunctionDef)
        if length_of(node) > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_no_global_statement() -> None:
    assert [f"{name}:{node.lineno}" for name, node in every(ast.Global)] == []


def test_no_mutable_module_state() -> None:
    """A module may bind a mutable object to a CONSTANT that nothing in it changes; to any other name it may not."""
    found = []
    for name, tree in TREES.items():
        mutable = [(bound, line) for bound, line, value in bindings(tree) if is_mutable(value) and bound != "__all__"]
        constants = {bound for bound, _ in mutable}
        found += [f"{name}:{line} {bound}" for bound, line in mutable if not bound.lstrip("_").isupper()]
        found += [f"{name}:{line} changes {bound}" for bound, line in changes(tree) if bound in constants]
    assert found == []


def test_no_mutable_class_attributes() -> None:
    """Structs and dataclasses copy or refuse mutable defaults; in a plain class all instances would share them."""
    shared = [
        f"{name}:{line} {cls.name}.{bound}"
        for name, cls in every(ast.ClassDef)
        if not is_record(cls)
        for bound, line, value in bindings(cls)
        if is_mutable(value) and bound not in ("__slots__", "__match_args__")
    ]
    assert shared == []


def test_broad_except_only_where_allowed() -> None:
    broad = {name for name, handler in every(ast.ExceptHandler) if is_broad(handler)}
    assert broad <= BROAD_EXCEPT_FILES


def test_no_path_of_a_developers_machine() -> None:
    found = [
        f"{name}:{node.lineno} {node.value}"
        for name, node in every(ast.Constant)
        if isinstance(node.value, str) and re.match(r"/(home|Users|root|work|mnt|data)/", node.value)
    ]
    assert found == []


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_setting_has_default_docstring_and_metadata(field: dataclasses.Field[object]) -> None:
    assert field.default is not dataclasses.MISSING
    text = docs()[field.name]
    assert text[0].isupper() or text.startswith(field.name.removeprefix("default_")), text
    assert text.endswith(".")
    assert {"group", "choices", "flags", "metavar"} <= set(field.metadata)


def test_settings_errors_name_their_flag() -> None:
    """Every check in `Config` starts its message with a flag that exists."""
    text = (PACKAGE / "core" / "config.py").read_text(encoding="utf-8")
    named = set(re.findall(r'_require\([^"]*f?"(--[a-z-]+)', text))
    assert named
    assert named <= {flag(field.name) for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("module", ["vllm_mlx", "vllm_mlx.core.config", "vllm_mlx.cli.main", "vllm_mlx.cli.parser"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*(m for m in {HEAVY_MODULES!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


def test_generated_pages_are_current() -> None:
    command = [sys.executable, str(ROOT / "tools" / "docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_lock_files_hold_no_address() -> None:
    locks = sorted((ROOT / "requirements").glob("*.txt"))
    assert [lock.name for lock in locks] == ["cpu.txt", "cuda12.txt", "cuda13.txt", "metal.txt", "uv.txt"]
    for lock in locks:
        text = lock.read_text(encoding="utf-8")
        assert "://" not in text
        assert "--index" not in text
        assert "--find-links" not in text


# ---- how the rules read the code ----


def every(*kinds: type[Any]) -> Iterator[tuple[str, Any]]:
    """(file, node) of every node of some kinds."""
    return ((name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kinds))


def length_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def bindings(body_of: ast.Module | ast.ClassDef) -> Iterator[tuple[str, int, ast.expr]]:
    """(name, line, value) of every name that is bound in the body itself."""
    for node in body_of.body:
        if isinstance(node, ast.Assign):
            yield from ((t.id, node.lineno, node.value) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
            yield node.target.id, node.lineno, node.value


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        called = value.func.id if isinstance(value.func, ast.Name) else getattr(value.func, "attr", "")
        return called in MUTABLE_CALLS
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def is_record(cls: ast.ClassDef) -> bool:
    """Whether the class is a struct, a pydantic model or a dataclass, or derives from a class of its own package."""
    bases = {ast.unparse(base).rsplit(".", 1)[-1] for base in cls.bases}
    decorators = {ast.unparse(d).split("(")[0].rsplit(".", 1)[-1] for d in cls.decorator_list}
    return bool(bases - {"ABC", "Protocol", "object", "Exception"}) or "dataclass" in decorators


def changes(tree: ast.Module) -> list[tuple[str, int]]:
    """(name, line) of every `NAME[...] = `, `del NAME[...]`, `NAME.append(...)` and the like."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            owner: ast.expr = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            owner = node.func.value
        else:
            continue
        if isinstance(owner, ast.Name):
            found.append((owner.id, node.lineno))
    return found


MUTATORS = {
    *("append", "extend", "insert", "remove", "clear", "update", "setdefault", "pop", "popitem", "add", "discard"),
    *("appendleft", "popleft", "sort", "reverse"),
}


def is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    named = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(name) in ("Exception", "BaseException") for name in named)
