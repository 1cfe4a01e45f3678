"""The flags of `vllm-mlx bench-serve`, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vllm_mlx.cli import bench_serve_values as values

SWEEP, WORKLOAD, CAPACITY = "sweep", "workload", "capacity"
MODES = (SWEEP, WORKLOAD, CAPACITY)
GROUPS: Mapping[str, str] = {
    "server": "The server",
    "prompts": "Prompt sweep: what is asked",
    "load": "Prompt sweep: the load",
    "answers": "Every request",
    "workload": "Workloads",
    "capacity": "Capacity envelope",
    "results": "Results",
}
FORMATS = ("auto", "table", "json", "csv", "sql", "sqlite")


class Flag(NamedTuple):
    """One flag. `read` turns its text into a value; None: the flag takes none."""

    name: str
    group: str
    read: Callable[[str], Any] | None
    default: Any
    metavar: str
    text: str
    modes: tuple[str, ...] = MODES
    """Kinds of runs in which it means something."""
    is_repeatable: bool = False

    @property
    def dest(self) -> str:
        """Its name among the parsed values."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def default_text(self) -> str:
        """The default as one would type it; empty if there is none to speak of."""
        if self.default is None or self.default is False or self.default in ((), (None,), ({},)):
            return ""
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        return str(self.default).lower() if isinstance(self.default, bool) else f"{self.default}"


_SERVER = (
    Flag("--url", "server", values.url, "http://127.0.0.1:8000", "URL", "Base address of the server."),
    Flag("--model", "server", values.text, None, "ID", "Model to ask; without it, the first that the server lists."),
    Flag("--api-key", "server", values.text, None, "KEY", "Bearer key; without it, $VLLM_MLX_API_KEY."),
    Flag(
        "--endpoint", "server", values.chosen("chat", "completions"), "chat", "{chat,completions}",
        "Ask /v1/chat/completions or /v1/completions.",
    ),
    Flag(
        "--request-timeout-s", "server", values.number, 300.0, "S",
        "Longest silence while an answer is awaited; 0: no limit.",
    ),
)  # fmt: skip
_PROMPTS = (
    Flag(
        "--prompts", "prompts", values.words, ("short", "medium", "long"), "SETS",
        "Prompt sets with commas between: short, medium, long, thinking, or paths of JSON files. With --prompt-words "
        "or --prompt-mix none, unless named.", (SWEEP,),
    ),
    Flag(
        "--prompt-file", "prompts", values.path, None, "FILE",
        "One more prompt set: a JSON list of messages, of lists of messages, or of texts.", (SWEEP,),
    ),
    Flag("--prompt-words", "prompts", values.counts, (), "N,...", "Generated prompts of so many words.", (SWEEP,)),
    Flag(
        "--prompt-mix", "prompts", values.mix, (), "MIX",
        "Generated prompts of several lengths in words, in random order, such as 2x16384,30x100. Repeatable.",
        (SWEEP,), is_repeatable=True,
    ),
    Flag(
        "--shared-prefix", "prompts", None, False, "",
        "Let prompts begin alike and differ at their end. Otherwise each begins with words of its own.", (SWEEP,),
    ),
    Flag(
        "--system-prompt-file", "prompts", values.path, None, "FILE",
        "A text that is the system message of every prompt, the same for all.", (SWEEP,),
    ),
    Flag(
        "--skip-preflight-token-count", "prompts", None, False, "",
        "Do not ask a server whose streams report no token counts for the length of a prompt. Implied by "
        "--system-prompt-file.", (SWEEP,),
    ),
)  # fmt: skip
_LOAD = (
    Flag("--concurrency", "load", values.counts, (1, 4), "N,...", "Clients at once; each value is a run.", (SWEEP,)),
    Flag(
        "--request-rate", "load", values.rates, (), "R,...",
        "Requests per second as a Poisson process, or inf for all at once, instead of clients that wait for their "
        "answers. --concurrency then bounds how many are open.", (SWEEP,),
    ),
    Flag(
        "--num-requests", "load", values.count, None, "N",
        "Requests per repetition; without it, one for each client, or all of a mix.", (SWEEP,),
    ),
    Flag("--repetitions", "load", values.count, 3, "N", "Measured repetitions of each.", (SWEEP, WORKLOAD)),
    Flag("--warmup", "load", values.count_or_none, 1, "N", "Repetitions before, unmeasured.", (SWEEP, WORKLOAD)),
    Flag(
        "--seed", "load", values.count_or_none, None, "N",
        "Makes prompts and arrival times repeatable; without it, one is drawn and reported.",
    ),
)  # fmt: skip
_ANSWERS = (
    Flag("--max-tokens", "answers", values.count, 256, "N", "Most tokens of an answer.", (SWEEP, WORKLOAD)),
    Flag(
        "--temperature", "answers", values.temperature, 0.0, "X", "Sampling temperature, or `server`.",
        (SWEEP, WORKLOAD),
    ),
    Flag("--ignore-eos", "answers", None, False, "", "Ask the server to go on to --max-tokens (`ignore_eos`)."),
    Flag(
        "--enable-thinking", "answers", values.switches, (None,), "BOOLS",
        "Variable `enable_thinking` of the chat template: true, false, or true,false for a run of each.",
        (SWEEP, CAPACITY),
    ),
    Flag(
        "--extra-body", "answers", values.objects, ({},), "JSON,...",
        "More fields of each request, as JSON objects; each object is a run. null takes a field out.",
        (SWEEP, CAPACITY),
    ),
)  # fmt: skip
_WORKLOAD = (
    Flag(
        "--workload", "workload", values.path, None, "FILE",
        "Run the cases of a workload file and check the answers, instead of the prompt sweep.", (WORKLOAD,),
    ),
    Flag("--include-content", "workload", None, False, "", "Keep whole answers in the JSON output.", (WORKLOAD,)),
    Flag(
        "--cache-policy", "workload", values.chosen("preserve", "before-run", "before-case"), None, "POLICY",
        "When to empty the server's cache: preserve, before-run or before-case; without it, as the workload says.",
        (WORKLOAD,),
    ),
)  # fmt: skip
_CAPACITY = (
    Flag(
        "--capacity-envelope", "capacity", None, False, "",
        "Measure how many clients the server sustains, instead of the prompt sweep.", (CAPACITY,),
    ),
    Flag(
        "--capacity-concurrency", "capacity", values.counts, (1, 2, 4, 8, 16, 32), "N,...", "Clients at once.",
        (CAPACITY,),
    ),
    Flag(
        "--capacity-prompt-tokens", "capacity", values.counts, (256, 2048, 8192, 32768), "N,...",
        "Prompt lengths, approximately.", (CAPACITY,),
    ),
    Flag(
        "--capacity-output-tokens", "capacity", values.counts, (128, 512), "N,...", "Output limits.", (CAPACITY,),
    ),
    Flag(
        "--capacity-cache-modes", "capacity", values.several("cold", "warm", "prefix-hit", "prefix-miss"),
        ("cold", "warm", "prefix-hit", "prefix-miss"), "MODES", "States of the server's cache.", (CAPACITY,),
    ),
    Flag("--capacity-repetitions", "capacity", values.count, 3, "N", "Measured repetitions of a cell.", (CAPACITY,)),
    Flag("--capacity-warmup", "capacity", values.count_or_none, 1, "N", "Requests before a cell.", (CAPACITY,)),
    Flag(
        "--capacity-baseline-url", "capacity", values.url, None, "URL",
        "A server whose greedy output must be the same.", (CAPACITY,),
    ),
    Flag("--capacity-max-p95-ttft-ms", "capacity", values.number, None, "MS", "Longest p95 TTFT.", (CAPACITY,)),
    Flag(
        "--capacity-max-p95-chunk-gap-ms", "capacity", values.number, None, "MS", "Longest p95 gap between chunks.",
        (CAPACITY,),
    ),
    Flag("--capacity-max-p95-e2e-ms", "capacity", values.number, None, "MS", "Longest p95 answer.", (CAPACITY,)),
    Flag("--capacity-max-failure-rate", "capacity", values.share, 0.0, "X", "Failures per request.", (CAPACITY,)),
    Flag("--capacity-max-ooms", "capacity", values.count_or_none, 0, "N", "Failures for memory.", (CAPACITY,)),
    Flag("--capacity-max-timeouts", "capacity", values.count_or_none, 0, "N", "Failures for time.", (CAPACITY,)),
)  # fmt: skip
_RESULTS = (
    Flag("--output", "results", values.path, None, "FILE", "Write results to a file instead of standard output."),
    Flag(
        "--format", "results", values.chosen(*FORMATS), "auto", "FORMAT",
        "table, json, csv, sql, sqlite (appended to --output), or auto: by the file's ending, else a table for "
        "prompt sweeps and JSON for the others.",
    ),
    Flag("--validate", "results", values.switch, True, "BOOL", "Check that answers say something.", (SWEEP,)),
    Flag("--scrape-metrics", "results", values.switch, True, "BOOL", "Read the server's /metrics before and after."),
    Flag("--include-requests", "results", None, False, "", "Keep every request in the JSON output.", (SWEEP,)),
    Flag("--tag", "results", values.text, None, "TEXT", "Stored in every row."),
    Flag(
        "--override-field", "results", values.assignment, (), "KEY=VALUE",
        "Set result fields, such as chip=M4Pro.", is_repeatable=True,
    ),
)  # fmt: skip
FLAGS = (*_SERVER, *_PROMPTS, *_LOAD, *_ANSWERS, *_WORKLOAD, *_CAPACITY, *_RESULTS)


def defaults() -> dict[str, Any]:
    """Parsed value of every flag that is not given."""
    return {flag.dest: flag.default for flag in FLAGS}
