"""The kernel of a text: its parameters, and the C++ function that calls it on a thread of the emulator."""

from __future__ import annotations

from dataclasses import dataclass

from runner.metal.tokens import NotMetalError, Token

# Attribute of a kernel parameter -> member of `emulated::Attributes`
VECTORS = {
    "thread_position_in_grid": "position_in_grid",
    "thread_position_in_threadgroup": "position_in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup_position",
    "threads_per_grid": "threads_per_grid",
    "grid_size": "threads_per_grid",
    "threads_per_threadgroup": "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup": "dispatch_threads_per_threadgroup",
    "threadgroups_per_grid": "threadgroups_per_grid",
}
SCALARS = {
    "thread_index_in_threadgroup": "index_in_threadgroup",
    "thread_index_in_simdgroup": "index_in_simdgroup",
    "simdgroup_index_in_threadgroup": "simdgroup_index",
    "simdgroups_per_threadgroup": "simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup": "dispatch_simdgroups_per_threadgroup",
}
SIMD_WIDTHS = {"threads_per_simdgroup", "thread_execution_width"}


@dataclass(frozen=True)
class Kernel:
    name: str
    template_arguments: str
    """With angle brackets; empty where the kernel is no template."""
    attributes: tuple[str, ...]
    """Of its parameters; 'buffer' for those that are buffers."""


def find_kernel(tokens: list[Token]) -> Kernel:
    """The function marked [[kernel]], and with which template arguments it is instantiated."""
    texts = [token.text for token in tokens if not token.is_blank]
    mark = ["[", "[", "kernel", "]", "]", "void"]
    marks = [place for place in range(len(texts)) if texts[place : place + len(mark)] == mark]
    if len(marks) != 1:
        raise NotMetalError(f"{len(marks)} functions are marked [[kernel]] void, one was expected")
    start = marks[0] + len(mark)
    attributes = tuple(_attribute(parameter) for parameter in _parameters(texts, start + 1))
    return Kernel(texts[start], _template_arguments(texts, texts[start]), attributes)


def entry(kernel: Kernel) -> str:
    """C++ that fills in the kernel's arguments."""
    arguments = [f"::emulated::buffer(buffers[{index}])" for index in range(kernel.attributes.count("buffer"))]
    buffers = iter(arguments)
    call = ", ".join(next(buffers) if name == "buffer" else _argument(name) for name in kernel.attributes)
    return (
        f'#line 1 "entry"\nconst int emulated::num_arguments = {len(arguments)};\n'
        "void emulated::call_kernel(void* const* buffers, const Attributes& attributes) {\n"
        f"  (void)buffers, (void)attributes;\n  ::{kernel.name}{kernel.template_arguments}({call});\n}}\n"
    )


def _parameters(texts: list[str], opening: int) -> list[list[str]]:
    """The tokens of each parameter of a list in parentheses."""
    parameters: list[list[str]] = [[]]
    depth = 0
    for text in texts[opening:]:
        depth += (text in "(<") - (text in ")>")
        if not depth:
            break
        if text == "," and depth == 1:
            parameters.append([])
        else:
            parameters[-1].append(text)
    return parameters


def _attribute(parameter: list[str]) -> str:
    place = parameter.index("[") if "[" in parameter else None
    name = "" if place is None else parameter[place + 2]
    if name != "buffer" and name not in VECTORS | SCALARS and name not in SIMD_WIDTHS:
        raise NotMetalError(f"kernel parameter '{' '.join(parameter)}': the emulator knows no such attribute")
    return name


def _argument(attribute: str) -> str:
    if attribute in SIMD_WIDTHS:
        return "::emulated::lanes_per_simdgroup"
    if attribute in SCALARS:
        return f"attributes.{SCALARS[attribute]}"
    member = VECTORS[attribute]
    return f"::uint3(attributes.{member}[0], attributes.{member}[1], attributes.{member}[2])"


def _template_arguments(texts: list[str], name: str) -> str:
    """From `template [[host_name("...")]] [[kernel]] decltype(name<...>) name<...>;`"""
    starts = [place for place in range(len(texts)) if texts[place : place + 4] == ["template", "[", "[", "host_name"]]
    if not starts:
        return ""
    instantiation = texts[starts[0] : texts.index(";", starts[0])]
    last = len(instantiation) - instantiation[::-1].index(name)
    return "".join(instantiation[last:])
