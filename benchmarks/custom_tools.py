"""How many calls of a custom tool follow its Lark grammar, at a temperature at which the model alone would not.

    vllm-mlx serve demo --port 8470 --timeout 0 &
    python benchmarks/custom_tools.py http://127.0.0.1:8470 --requests 100

The grammar is like that of Codex's apply_patch. A call that was cut off by its length counts as none.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import time

import openai

GRAMMAR = r"""start: "*** Begin Patch\n" file{1,2} "*** End Patch"
file: "*** Update File: " PATH "\n" change{1,3}
change: ("+" | "-" | " ") LINE "\n"
PATH: /[a-z]{1,12}\.py/
LINE: /[a-z =0-9()]{0,24}/
"""
PATCH = re.compile(
    r"\*\*\* Begin Patch\n(\*\*\* Update File: [a-z]{1,12}\.py\n([+\- ][a-z =0-9()]{0,24}\n){1,3}){1,2}\*\*\* End Patch"
)
TOOL = {
    "type": "custom",
    "custom": {
        "name": "apply_patch",
        "description": "Changes files.",
        "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": GRAMMAR}},
    },
}


def follows(client: openai.OpenAI, number: int) -> bool:
    """Whether one answer is calls of the tool whose texts match."""
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"Change file number {number}."}],
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice={"type": "custom", "custom": {"name": "apply_patch"}},
        temperature=1.5,
        seed=number,
        max_tokens=400,
    )
    choice = answer.choices[0]
    texts = [call.custom.input for call in choice.message.tool_calls or () if call.type == "custom"]
    return choice.finish_reason == "tool_calls" and bool(texts) and all(map(PATCH.fullmatch, texts))


def main() -> None:
    """Ask, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=16)
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none", timeout=1800)
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as threads:
        good = 0
        for done, is_good in enumerate(threads.map(lambda number: follows(client, number), range(args.requests)), 1):
            good += is_good
            print(f"{good} of {done} follow the grammar, after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
