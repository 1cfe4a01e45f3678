"""Every setting, in one frozen record.

Flags, `--help`, environment variables (`VLLM_MLX_<FIELD>`) and `docs/reference/settings.md` are generated from the
fields below: the type, the default, the docstring under the field and the `setting(...)` metadata.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mlx.core.errors import ConfigError, InvalidRequest
from vllm_mlx.core.sampling import SamplingParams


def setting(
    default: Any, *, group: str, choices: tuple[str, ...] = (), flags: tuple[str, ...] = (), metavar: str = ""
) -> Any:
    """A field of `Config`. `flags` are extra spellings besides `--field-name`; `choices` limits a text setting."""
    metadata = {"group": group, "choices": choices, "flags": flags, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


EXPANDED_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Choices of `weights_dtype` that expand weights, and the `dtype` that goes with each."""


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
"""A token of RFC 9110, section 5.6.2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of one served model."""

    model: str = setting("demo", group="model")
    """A local folder, a Hugging Face id, a .gguf file, or `demo` (SmolLM2-135M-Instruct)."""
    served_model_name: str | None = setting(None, group="model", metavar="NAME")
    """Name of the model in the API; the model argument if not given."""
    revision: str | None = setting(None, group="model")
    """Branch, tag or commit of a Hugging Face model."""
    trust_remote_code: bool = setting(False, group="model")
    """Allow Python code that comes with the model to run."""
    dtype: str = setting("auto", group="model", choices=("auto", "float32", "bfloat16", "float16"))
    """Type that weights and activations are computed in; auto is the model's own on a GPU and float32 on a CPU."""
    weights_dtype: str = setting("auto", group="model", choices=("auto", "stored", *EXPANDED_DTYPES))
    """Form of quantised weights: packed as stored, or expanded at load to a type that is then computed in too; auto
    expands them on a CPU, and on CUDA where that measures faster and memory allows."""
    max_model_len: int | None = setting(None, group="model", metavar="TOKENS")
    """Longest sequence, prompt and output together; the model's own limit if not given."""
    offline: bool = setting(False, group="model")
    """Never use the network; only models that are already here."""
    download_timeout: int = setting(300, group="model", metavar="SECONDS")
    """Seconds without a byte after which a download fails."""
    download_retries: int = setting(3, group="model", metavar="N")
    """How often a failed download is tried again (it resumes where it stopped)."""
    cache_dir: str | None = setting(None, group="model", metavar="DIR")
    """Where converted models are kept; ~/.cache/vllm-mlx if not given."""

    host: str = setting("127.0.0.1", group="server")
    """Address to listen on; 0.0.0.0 opens the server to the network."""
    port: int = setting(8000, group="server")
    """TCP port to listen on."""
    api_key: str | None = setting(None, group="server", metavar="KEY")
    """Key that clients must send; without it everybody may use the server."""
    model_aliases: bool = setting(True, group="server")
    """Answer requests for cloud models (claude-*, gpt-*, codex-*, o3 and the like) with the served model, so that
    clients need not be told its name."""
    model_alias: tuple[str, ...] = setting((), group="server", metavar="PATTERN=NAME")
    """One more name, or pattern of names, for the served model NAME; =NAME may be left out. May be given several
    times."""
    allowed_origins: tuple[str, ...] = setting((), group="server", metavar="ORIGIN[,ORIGIN...]")
    """Web pages that may use the server from a browser, such as https://chat.example.org; * allows all. Pages of this
    machine may always. May be given several times."""
    timeout: float = setting(300.0, group="server", metavar="SECONDS")
    """Longest time a request may take, unless it asks for less or more with `timeout`; 0 is no limit."""
    cache_tenant_header: str | None = setting(None, group="server", metavar="NAME")
    """HTTP header whose value names the tenant of a request: tenants share no remembered prefixes. Requests without it
    are one tenant."""
    warm_prompts: str | None = setting(None, group="server", metavar="FILE")
    """JSON list of message lists, computed before the server is ready and kept in memory."""
    drain_timeout: float = setting(30.0, group="server", metavar="SECONDS")
    """After SIGTERM, how long running requests may take to finish."""
    max_body_mb: int = setting(32, group="server", metavar="MIB")
    """Largest request body."""
    files_dir: str | None = setting(None, group="server", metavar="DIR")
    """Where uploaded files, batches and their results are kept; the folder `files` in --cache-dir if not given."""
    files_max_mb: int = setting(200, group="server", metavar="MIB")
    """Largest uploaded file."""
    batch_concurrency: int = setting(8, group="server", metavar="N")
    """Most lines of a batch computed at the same time; they begin only when no other request waits."""
    keepalive_interval: float = setting(5.0, group="server", metavar="SECONDS")
    """A silent stream gets a comment line this often, so that proxies do not close it."""
    stream_interval: int = setting(1, group="server", metavar="TOKENS")
    """Tokens per streamed event: 1 is smoothest, more costs less."""
    response_store: str | None = setting(None, group="server", metavar="PATH")
    """SQLite file of stored responses and conversations, and of the key that seals reasoning; kept in memory, and
    lost with the server, if not given."""
    response_store_max: int = setting(1000, group="server", metavar="N")
    """Most stored responses and conversations; what was used longest ago is deleted first."""
    response_store_max_mb: int = setting(256, group="server", metavar="MIB")
    """Most that stored responses and conversations take."""
    response_store_ttl: float = setting(720.0, group="server", metavar="HOURS")
    """Hours after its last use that a stored response or conversation is kept."""
    log_level: str = setting("info", group="server", choices=("debug", "info", "warning", "error"))
    """Least severe log line that is printed."""
    log_format: str = setting("text", group="server", choices=("text", "json"))
    """Log lines for a person or for a machine."""

    max_num_seqs: int = setting(256, group="engine", metavar="N")
    """Most sequences decoded at the same time."""
    max_waiting: int = setting(1024, group="engine", metavar="N")
    """Most sequences waiting for their turn; past that requests are answered 503."""
    prefill_step_size: int = setting(2048, group="engine", metavar="TOKENS", flags=("--chunked-prefill-tokens",))
    """Most prompt tokens computed in one step."""
    decode_stall_ms: float = setting(200.0, group="engine", metavar="MS")
    """While streams run, prompts are computed in chunks that take about this long; longer in a burst of prompts."""
    cache_memory_mb: int | None = setting(None, group="engine", metavar="MIB")
    """Memory for the KV cache; overrides --cache-memory-percent."""
    cache_memory_percent: float = setting(0.2, group="engine", metavar="FRACTION")
    """Fraction of the device's memory for the KV cache."""
    kv_cache_dtype: str = setting("auto", group="engine", choices=("auto", "int8", "int4"))
    """Form of keys and values in pages: auto is the model's type; int8 holds almost twice as many tokens, int4 three
    and a half times as many, at some loss of quality."""
    gpu_memory_utilization: float = setting(0.9, group="engine", metavar="FRACTION")
    """Fraction of the GPU's memory that weights, KV cache and temporaries may use together."""
    prefix_cache: bool = setting(True, group="engine", flags=("--enable-prefix-cache",))
    """Remember computed prefixes in free pages, and share them between requests."""
    stable_prompts: bool = setting(True, group="engine")
    """Take fields that change with every request and mean nothing to the model, such as Claude Code's billing line,
    out of system messages, so that prefixes stay equal."""
    ssd_cache_dir: str | None = setting(None, group="engine", metavar="DIR")
    """Folder for computed prefixes that memory has no room for; they survive a restart. Nothing is written to disk
    if not given."""
    ssd_cache_max_gb: float = setting(20.0, group="engine", metavar="GB")
    """Most that all models together may keep in --ssd-cache-dir; what was used longest ago is deleted first."""
    ssd_cache_daily_write_gb: float = setting(100.0, group="engine", metavar="GB")
    """Most written to --ssd-cache-dir in a day (UTC), to spare the disk; 0 is no limit."""
    ssd_cache_min_free_gb: float = setting(5.0, group="engine", metavar="GB")
    """Space on the disk of --ssd-cache-dir that is left to others: below it nothing is written."""
    ssd_cache_key_file: str | None = setting(None, group="engine", metavar="FILE")
    """Encrypt what is written to --ssd-cache-dir with the key in this file: 32 bytes, or 64 hexadecimal digits."""
    enforce_eager: bool = setting(False, group="engine")
    """On a GPU, build every decode step anew instead of compiling it: slower, but ready sooner."""
    num_pages: int | None = setting(None, group="engine", metavar="N")
    """Exact number of KV pages instead of a memory size, each of one group of layers; for tests."""
    engine: str = setting("process", group="engine", choices=("process", "thread"))
    """Where the model runs: in a supervised child process, or in a thread of the server."""
    engine_start_attempts: int = setting(3, group="engine", metavar="N")
    """Failed starts in a row after which the engine is given up."""
    engine_stall_timeout: float = setting(600.0, group="engine", metavar="SECONDS")
    """A step that takes longer means the engine hangs; it is killed and restarted."""

    max_tokens: int = setting(32768, group="defaults", metavar="N")
    """Output tokens when a request names no limit (the context permitting)."""
    max_request_tokens: int = setting(32768, group="defaults", metavar="N")
    """Largest max_tokens that a request may ask for."""
    default_temperature: float | None = setting(None, group="defaults", metavar="X")
    """Temperature when a request gives none; the model's own default if not given."""
    default_top_p: float | None = setting(None, group="defaults", metavar="X")
    """top_p when a request gives none; the model's own default if not given."""
    default_top_k: int | None = setting(None, group="defaults", metavar="N")
    """top_k when a request gives none; the model's own default if not given."""
    default_min_p: float | None = setting(None, group="defaults", metavar="X")
    """min_p when a request gives none."""
    default_presence_penalty: float | None = setting(None, group="defaults", metavar="X")
    """presence_penalty when a request gives none."""
    default_frequency_penalty: float | None = setting(None, group="defaults", metavar="X")
    """frequency_penalty when a request gives none."""
    default_repetition_penalty: float | None = setting(None, group="defaults", metavar="X")
    """repetition_penalty when a request gives none; the model's own default if not given."""
    default_thinking_token_budget: int | None = setting(None, group="defaults", metavar="TOKENS")
    """Most tokens of reasoning when a request gives no thinking_token_budget; then the answer is made to begin."""
    break_thinking_loops: bool = setting(True, group="defaults")
    """Close reasoning that repeats itself exactly, over and over."""
    tool_call_parser: str = setting("auto", group="defaults", metavar="NAME")
    """Format in which the model writes tool calls: a name of docs/reference/parsers.md, auto (told from the chat
    template), or none to leave calls in the text."""
    reasoning_parser: str = setting("auto", group="defaults", metavar="NAME")
    """Format in which the model marks its reasoning: a name of docs/reference/parsers.md, auto (told from the chat
    template), or none to leave reasoning in the text."""
    default_chat_template_kwargs: dict[str, Any] | None = setting(None, group="defaults", metavar="JSON")
    """Variables for the chat template, as a JSON object; a request may override each."""

    def __post_init__(self) -> None:
        _require(self.model != "", "--model must not be empty")
        _require(self.api_key != "", "--api-key must not be empty; leave it out to need none")
        _require(0 <= self.port <= 65535, "--port must be between 0 and 65535")
        _require(self.max_num_seqs >= 1, "--max-num-seqs must be at least 1")
        _require(self.max_waiting >= 0, "--max-waiting must not be negative")
        _require(self.prefill_step_size >= 1, "--prefill-step-size must be at least 1")
        _require(self.decode_stall_ms > 0, "--decode-stall-ms must be greater than 0")
        _require(self.stream_interval >= 1, "--stream-interval must be at least 1")
        _require(self.max_body_mb >= 1, "--max-body-mb must be at least 1")
        _require(self.files_dir != "", "--files-dir must not be empty; leave it out to use the cache folder")
        _require(self.files_max_mb >= 1, "--files-max-mb must be at least 1")
        _require(self.batch_concurrency >= 1, "--batch-concurrency must be at least 1")
        _require(self.keepalive_interval > 0, "--keepalive-interval must be greater than 0")
        _require(self.timeout >= 0, "--timeout must not be negative (0 is no limit)")
        _require(self.drain_timeout >= 0, "--drain-timeout must not be negative")
        _require(self.max_model_len is None or self.max_model_len >= 2, "--max-model-len must be at least 2")
        _require(self.num_pages is None or self.num_pages >= 2, "--num-pages must be at least 2")
        _require(self.cache_memory_mb is None or self.cache_memory_mb >= 1, "--cache-memory-mb must be at least 1")
        _require(0 < self.cache_memory_percent <= 1, "--cache-memory-percent must be in (0, 1]")
        _require(0 < self.gpu_memory_utilization <= 1, "--gpu-memory-utilization must be in (0, 1]")
        _require(self.max_tokens >= 1, "--max-tokens must be at least 1")
        _require(self.max_request_tokens >= 1, "--max-request-tokens must be at least 1")
        _require(self.max_tokens <= self.max_request_tokens, "--max-tokens must not exceed --max-request-tokens")
        expanded = EXPANDED_DTYPES.get(self.weights_dtype, self.dtype)
        _require(
            self.dtype in ("auto", expanded),
            f"--weights-dtype {self.weights_dtype} computes in {expanded}, not in --dtype {self.dtype}; leave one out",
        )
        budget = self.default_thinking_token_budget
        _require(budget is None or budget >= 0, "--default-thinking-token-budget must not be negative")
        _require(self.download_timeout >= 1, "--download-timeout must be at least 1")
        _require(self.download_retries >= 0, "--download-retries must not be negative")
        _require(self.engine_start_attempts >= 1, "--engine-start-attempts must be at least 1")
        _require(self.engine_stall_timeout > 0, "--engine-stall-timeout must be greater than 0")
        _require(self.response_store != "", "--response-store must not be empty; leave it out to use memory")
        _require(self.response_store_max >= 1, "--response-store-max must be at least 1")
        _require(self.response_store_max_mb >= 1, "--response-store-max-mb must be at least 1")
        _require(0 < self.response_store_ttl < math.inf, "--response-store-ttl must be greater than 0")
        self._check_ssd_cache()
        self._check_aliases()
        self._check_headers()
        _require(self.warm_prompts != "", "--warm-prompts must not be empty; leave it out to warm nothing")
        for name in ("ssd_cache_dir", "warm_prompts"):
            _require(
                self.prefix_cache or getattr(self, name) is None,
                f"{flag(name)} keeps prefixes, and --no-prefix-cache forbids it: leave out one of them",
            )
        self._check_sampling_defaults()
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            _require(
                not choices or value in choices,
                f"{flag(field.name)} must be one of {', '.join(choices)}, not {value!r}",
            )

    def _check_ssd_cache(self) -> None:
        _require(self.ssd_cache_dir != "", "--ssd-cache-dir must not be empty; leave it out to keep nothing on disk")
        _require(0 < self.ssd_cache_max_gb < math.inf, "--ssd-cache-max-gb must be a size greater than 0")
        _require(
            0 <= self.ssd_cache_daily_write_gb < math.inf,
            "--ssd-cache-daily-write-gb must be a size, not negative (0 is no limit)",
        )
        _require(0 <= self.ssd_cache_min_free_gb < math.inf, "--ssd-cache-min-free-gb must be a size, not negative")
        _require(self.ssd_cache_key_file != "", "--ssd-cache-key-file must not be empty; leave it out to need no key")
        _require(
            self.ssd_cache_key_file is None or self.ssd_cache_dir is not None,
            "--ssd-cache-key-file encrypts the cache on disk; give --ssd-cache-dir too",
        )

    def _check_headers(self) -> None:
        for origin in self.origins:
            _require(
                origin == "*" or _ORIGIN.fullmatch(origin) is not None,
                f"--allowed-origins: {origin!r} must be * or like https://chat.example.org:8080, without a path",
            )
        header = self.cache_tenant_header
        _require(
            header is None or _HEADER_NAME.fullmatch(header) is not None,
            f"--cache-tenant-header must be the name of an HTTP header, not {header!r}",
        )

    def _check_aliases(self) -> None:
        for pattern, name in self.alias_rules:
            _require(pattern != "", "--model-alias must be PATTERN or PATTERN=NAME, with a PATTERN such as my-model*")
            _require(
                name in (self.model_name, self.model),
                f"--model-alias: {name!r} is not served; the served model is {self.model_name!r}",
            )

    def _check_sampling_defaults(self) -> None:
        try:
            SamplingParams(**self.sampling_defaults)
        except InvalidRequest as error:
            raise ConfigError(f"--default-{error.message.replace('_', '-')}") from error

    @property
    def model_name(self) -> str:
        """The name that the API shows."""
        return self.served_model_name or self.model

    @property
    def origins(self) -> tuple[str, ...]:
        """Each of --allowed-origins."""
        parts = (part.strip() for given in self.allowed_origins for part in given.split(","))
        return tuple(part for part in parts if part)

    @property
    def alias_rules(self) -> tuple[tuple[str, str], ...]:
        """Pattern and name of each --model-alias."""
        parts = [given.partition("=") for given in self.model_alias]
        return tuple((pattern, name if is_named else self.model_name) for pattern, is_named, name in parts)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Sampling fields that the operator set with `--default-*`."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        given = {name: getattr(self, f"default_{name}") for name in names}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def cache_path(self) -> Path:
        """Folder of converted models."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else Path.home() / ".cache" / "vllm-mlx"

    @property
    def files_path(self) -> Path:
        """Folder of uploaded files and batches."""
        return Path(self.files_dir).expanduser() if self.files_dir else self.cache_path / "files"


def flag(field_name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + field_name.replace("_", "-")


@functools.cache
def docs() -> dict[str, str]:
    """Field name to the docstring under it (read from the source once; needed for help and docs only)."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(Config)))  # type: ignore[arg-type]
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    found = {}
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            found[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return found


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message + ".")
