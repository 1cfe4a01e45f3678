"""What quantised pages cost in quality: perplexity, and how often the likeliest token stays the same.

    python benchmarks/kv_quality.py [--model demo] [--text FILE] [--windows 4] [--window-tokens 1024]
        [--prompts 8] [--tokens 48] [--output FILE]

Each form of `--kv-cache-dtype` computes windows of a text (without --text, of this project's design pages) in float32,
every token attending to what the pages give back, its own included. "Same top token" is the share of positions where
the likeliest next token is that of full precision. Then prompts of 64 tokens from the text are continued greedily by
the whole engine, as one batch, and compared token by token.

On Linux run it with a fast BLAS: eval "$(python -m vllm_mlx.runner.blas)"
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec

from vllm_mlx import LLM, SamplingParams
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.config import Config
from vllm_mlx.models.resolve import resolve
from vllm_mlx.runner import attention, device, weights
from vllm_mlx.runner.geometry import SinglePlace
from vllm_mlx.runner.kernel_choice import quantise_pages
from vllm_mlx.runner.layers import PAGE_SIZE, ModelLayers, inspect_layers
from vllm_mlx.runner.load import untouched_file_limit
from vllm_mlx.runner.pages import GrowingPages

FORMS = ("auto", "int8", "int4")
PAGES = Path(__file__).resolve().parents[1] / "docs"
PROMPT_TOKENS = 64


class Line(msgspec.Struct, frozen=True):
    """What one form gave."""

    form: str
    bytes_per_token: float
    perplexity: float
    same_top_share: float
    """Of positions, against full precision."""
    same_answers: int
    """Greedy answers that are the same to the last token."""
    mean_same_tokens: float
    """Tokens of an answer before the first one that differs."""


class Windows(msgspec.Struct, frozen=True):
    """What a form makes of the windows."""

    perplexity: float
    top_tokens: list[list[int]]


def load_model(path: Path) -> tuple[nn.Module, ModelLayers]:
    """The model in float32, and its layers."""
    with untouched_file_limit():
        import mlx_lm.utils as library
    model, _ = library.load_model(path, lazy=True)
    found = device.probe()
    weights.prepare(model, "fp32", found=found, dtype=mx.float32, memory_bytes=found.memory_bytes)
    attention.bind()
    layers = inspect_layers(model, batched=True)
    if len(layers.paged) < len(layers.shapes):
        raise SystemExit("this script needs a model whose layers are all in pages")
    return model, layers


def compute(model: nn.Module, layers: ModelLayers, windows: Sequence[Sequence[int]]) -> Windows:
    """Every token of each window attends to pages."""
    num_pages, num_groups = -(-max(map(len, windows)) // PAGE_SIZE), len(layers.cache_spec().windows)
    tables = [tuple(range(group * num_pages, (group + 1) * num_pages)) for group in range(num_groups)]
    loss, count, top_tokens = 0.0, 0, []
    for tokens in windows:
        pages = GrowingPages(layers.paged, num_pages=num_groups * num_pages, max_pages=num_groups * num_pages)
        views = layers.fold(pages.single_views(SinglePlace(0, len(tokens), tables)))
        logits = model(mx.array(tokens)[None], cache=views)[0, :-1].astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.array(tokens[1:]))
        top = mx.argmax(logits, axis=-1)
        mx.eval(losses, top)
        loss, count = loss + float(mx.sum(losses).item()), count + losses.size
        top_tokens.append(top.tolist())
    return Windows(math.exp(loss / count), top_tokens)


def answers_of(model: str, form: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[tuple[str, ...]]:
    """Greedy continuations by the whole engine, as texts of their tokens."""
    greedy = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    with LLM(model, kv_cache_dtype=form, engine="thread") as llm:
        outputs = llm.generate([list(prompt) for prompt in prompts], greedy)
    return [tuple(token.token for token in output.outputs[0].tokens) for output in outputs]


def num_same(answer: Sequence[str], expected: Sequence[str]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(answer, expected, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(expected))


def share_of_same(found: Windows, expected: Windows) -> float:
    """Of positions with the same top token."""
    pairs = [
        (one, other)
        for tokens, others in zip(found.top_tokens, expected.top_tokens, strict=True)
        for one, other in zip(tokens, others, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def measure(given: argparse.Namespace) -> list[Line]:
    """All forms, one after the other."""
    path = resolve(Config(model=given.model), progress=lambda *_: None).path
    device.configure(device.probe(), Config().gpu_memory_utilization)
    tokens = Tokenizer.load(path).encode(read_text(given.text), add_special_tokens=False)
    size = given.window_tokens
    windows = [tokens[i * size : (i + 1) * size] for i in range(given.windows)]
    if len(windows[-1]) < max(2, PROMPT_TOKENS):
        raise SystemExit(f"the text has {len(tokens)} tokens: too few for {given.windows} windows of {size}")
    step = max(1, (len(tokens) - PROMPT_TOKENS) // given.prompts)
    prompts = [tokens[i * step : i * step + PROMPT_TOKENS] for i in range(given.prompts)]
    model, layers = load_model(path)
    results, lines = {}, []
    for form in FORMS:
        shaped, _ = quantise_pages(layers, form)
        results[form] = compute(model, shaped, windows)
        lines.append((form, shaped.cache_spec().page_bytes / PAGE_SIZE))
    answers = {form: answers_of(given.model, form, prompts, given.tokens) for form in FORMS}
    return [describe(form, size, results=results, answers=answers) for form, size in lines]


def describe(
    form: str, bytes_per_token: float, *, results: dict[str, Windows], answers: dict[str, list[tuple[str, ...]]]
) -> Line:
    """One form against full precision."""
    same = [num_same(one, other) for one, other in zip(answers[form], answers["auto"], strict=True)]
    return Line(
        form=form,
        bytes_per_token=bytes_per_token,
        perplexity=results[form].perplexity,
        same_top_share=share_of_same(results[form], results["auto"]),
        same_answers=sum(count == len(other) for count, other in zip(same, answers["auto"], strict=True)),
        mean_same_tokens=sum(same) / len(same),
    )


def read_text(path: Path | None) -> str:
    """A file, or the design pages."""
    pages = [path] if path is not None else [PAGES / "structure.md", *sorted((PAGES / "design").glob("*.md"))]
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, help="this project's design pages without it")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="length of a greedy answer")
    parser.add_argument("--output", type=Path, help="write the results here too, as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    given = parse_arguments(argv)
    lines = measure(given)
    print("| pages | bytes a token | perplexity | same top token | same answers | same tokens before |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in lines:
        print(
            f"| {line.form} | {line.bytes_per_token:,.0f} | {line.perplexity:.3f} | {line.same_top_share:.1%} | "
            f"{line.same_answers} of {given.prompts} | {line.mean_same_tokens:.1f} of {given.tokens} |"
        )
    if given.output is not None:
        results: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(given).items()}}
        results["results"] = msgspec.to_builtins(lines)
        given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
