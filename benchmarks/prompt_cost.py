"""What turning a conversation into a prompt costs the server: the first time, and with the next turn.

    python benchmarks/prompt_cost.py [--model FOLDER] [--tokens 20000,100000] [--rounds 5]

Compares with encoding the whole text, side by side on the same texts. Needs no MLX.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from vllm_mlx.chat.encode import PromptEncoder
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout
from vllm_mlx.core.chat import ChatRequest, Message
from vllm_mlx.core.config import Config
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import RunnerInfo
from vllm_mlx.models.resolve import resolve

TEXT = "self.config = load(path) if value is not None: return the result of every test in this folder"
WORDS_A_TURN = 1500
CACHE = CacheSpec(layers=(LayerSpec(Layout.PAGES),), page_size=32, page_bytes=1)
INFO = RunnerInfo(
    vocab_size=1 << 30, max_model_len=1 << 30, num_pages=2, cache=CACHE, backend="fake", device="", dtype="float32"
)


def conversation(tokenizer: Tokenizer, num_tokens: int, *, seed: str) -> tuple[Message, ...]:
    """Files that a coding agent has read, one after the other; the system text and the last result are marked."""
    draw = random.Random(seed)
    messages, count = [Message("system", f"You are agent {seed}.", keep_s=300)], 0
    while count < num_tokens:
        text = "\n".join(" ".join(draw.choices(TEXT.split(), k=10)) for _ in range(WORDS_A_TURN // 10))
        messages += [Message("assistant", f"I read file {len(messages)}."), Message("user", text)]
        count += len(tokenizer.encode(text, add_special_tokens=False))
    return (*messages[:-1], Message("user", messages[-1].content, keep_s=300))


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def measure(tokenizer: Tokenizer, num_tokens: int, *, rounds: int) -> str:
    """One line of the table: medians."""
    encoder, found = PromptEncoder(tokenizer, config=Config()), []
    for number in range(rounds):
        messages = conversation(tokenizer, num_tokens, seed=f"{num_tokens} {number}")
        before, after = (
            ChatRequest(request_id="r", messages=part, sampling=SamplingParams()) for part in (messages[:-2], messages)
        )
        first = seconds(lambda request=before: encoder.chat(request, INFO, wants_tail=True))
        turn = seconds(lambda request=after: encoder.chat(request, INFO, wants_tail=True))
        text = encoder.chat(after, INFO).text
        whole = seconds(lambda text=text: tokenizer.encode(text, add_special_tokens=False))
        found.append((first, turn, whole))
    first, turn, whole = (1000 * statistics.median(column) for column in zip(*found, strict=True))
    return f"| {num_tokens:,} | {first:.1f} | {turn:.1f} | {whole:.1f} | {turn / whole:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; without it, the demo model")
    parser.add_argument(
        "--tokens", type=lambda text: [int(part) for part in text.split(",")], default=[20_000, 100_000]
    )
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    tokenizer = Tokenizer.load(given.model or resolve(Config(model="demo"), progress=lambda *_: None).path)
    print("| tokens | first time, ms | next turn | encoding its text alone | next turn / that |")
    print("| --- | --- | --- | --- | --- |")
    for num_tokens in given.tokens:
        print(measure(tokenizer, num_tokens, rounds=given.rounds))


if __name__ == "__main__":
    main()
