"""How long the parsers take for a megabyte of output that comes in small pieces, hostile text included.

    python benchmarks/parse_output.py [FORMAT ...]

Prints the slowest texts of each format, in seconds of the processor.
"""

from __future__ import annotations

import argparse
import json
import time

from vllm_mlx.chat.formats import tool_format, tool_formats
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.reasoning import reasoning_format

SIZE = 1_000_000
PIECE = 8
TOOLS = ToolSet({"f": {"type": "object", "properties": {"x": {"type": "string"}}}, "get": {"type": "object"}})


def texts(openers: tuple[str, ...]) -> dict[str, str]:
    """By what is hard about it; `openers` are the marks of the format."""
    objects = json.dumps([{"a": i, "b": [i, {"c": "}{<tool_call"}]} for i in range(20_000)])
    opener = openers[0]
    repeated = {
        "prose": "The quick brown fox jumps over the lazy dog. ",
        "code": "if (a[i] < b[j] && {x: [1,2]} ) { <t> } ",
        "half a mark": opener[:-1] if len(opener) > 1 else "<tool_cal",
        "marks": opener,
        "marks and braces": f"{opener}{{",
        "marks and names": f"{opener} f ",
        "unclosed element": "<function=get>",
        "names": '{"name": ',
        **{sign: sign for sign in ("<", "[", "{", '{"', "\\", "<think>", "[f(")},
    }
    found = {name: (text * (SIZE // len(text) + 1))[:SIZE] for name, text in repeated.items()}
    call = '<tool_call>{"name": "f", "arguments": {"x": "'
    return found | {"objects": objects[:SIZE], "one call": call + "y" * SIZE, "escapes": call + "\\" * SIZE}


def seconds(name: str, text: str) -> float:
    """Of the processor, to parse the text in a format."""
    parser = OutputParser(
        tools=TOOLS, tool_format=tool_format(name), reasoning=reasoning_format("qwen3"), prompt_tail=""
    )
    began = time.process_time()
    for at in range(0, len(text), PIECE):
        parser.feed(text[at : at + PIECE])
    parser.finish()
    return time.process_time() - began


def main() -> None:
    """Measure the formats that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*")
    names = parser.parse_args().formats or [form.name for form in tool_formats()]
    for name in names:
        took = {label: seconds(name, text) for label, text in texts(tool_format(name).openers).items()}
        slowest = sorted(took.items(), key=lambda one: -one[1])[:3]
        print(f"{name:14}", "  ".join(f"{label} {time_s:.2f}" for label, time_s in slowest), flush=True)


if __name__ == "__main__":
    main()
