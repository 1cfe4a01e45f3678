"""Flags of earlier releases: the ones that no longer mean anything, and the ones whose feature does not exist yet.

Flags that kept their meaning are fields of `Config`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_mlx.core.errors import ConfigError


class OldFlag(NamedTuple):
    """A flag that is understood but sets nothing."""

    name: str
    takes_value: bool
    notice: str


_BATCHING = "requests are always batched continuously"
_BATCH_SIZE = "batches are sized by --max-num-seqs and --prefill-step-size"
_PAGES = "the KV cache is always paged; --cache-memory-mb sets its size"
_METRICS = "/metrics is always there"

NO_LONGER_NEEDED = (
    OldFlag("--continuous-batching", False, _BATCHING),
    OldFlag("--prefill-batch-size", True, _BATCH_SIZE),
    OldFlag("--completion-batch-size", True, _BATCH_SIZE),
    OldFlag("--mllm-prefill-step-size", True, "--prefill-step-size holds for every model"),
    OldFlag("--use-paged-cache", False, _PAGES),
    OldFlag("--paged-cache-block-size", True, _PAGES),
    OldFlag("--max-cache-blocks", True, _PAGES),
    OldFlag("--no-memory-aware-cache", False, _PAGES),
    OldFlag("--prefix-cache-size", True, _PAGES),
    OldFlag("--prefix-trie-cache", False, "prefixes are remembered unless --no-prefix-cache is given"),
    OldFlag("--prefix-trie-cache-size", True, _PAGES),
    OldFlag("--prefix-trie-cache-memory-mb", True, _PAGES),
    OldFlag("--kv-cache-quantization-group-size", True, "groups have 64 elements, or what divides a head"),
    OldFlag("--kv-cache-min-quantize-tokens", True, "--kv-cache-dtype quantises from the first token on"),
    OldFlag("--enable-auto-tool-choice", False, "tool calls are read wherever a request has tools"),
    OldFlag("--enable-metrics", False, _METRICS),
    OldFlag("--metrics", False, _METRICS),
)

NOT_SUPPORTED_YET = (
    OldFlag("--models-config", True, "several models in one server"),
    OldFlag("--memory-budget-gb", True, "several models in one server"),
    OldFlag("--auto-unload-idle-seconds", True, "unloading idle models"),
    OldFlag("--lazy-load-model", False, "loading at the first request"),
    OldFlag("--max-kv-size", True, "a bounded KV cache per sequence (--max-model-len bounds the sequence)"),
    OldFlag("--enable-mtp", False, "multi-token prediction"),
    OldFlag("--mtp", False, "multi-token prediction"),
    OldFlag("--mtp-num-draft-tokens", True, "multi-token prediction"),
    OldFlag("--mtp-optimistic", False, "multi-token prediction"),
    OldFlag("--specprefill", False, "speculative prefill"),
    OldFlag("--spec-prefill", False, "speculative prefill"),
    OldFlag("--specprefill-threshold", True, "speculative prefill"),
    OldFlag("--specprefill-keep-pct", True, "speculative prefill"),
    OldFlag("--specprefill-backbone-pct", True, "speculative prefill"),
    OldFlag("--specprefill-draft-model", True, "speculative prefill"),
    OldFlag("--moe-top-k", True, "fewer experts per token"),
    OldFlag("--mllm", False, "image, audio and video input"),
    OldFlag("--mllm-draft-model", True, "image, audio and video input"),
    OldFlag("--mllm-draft-kind", True, "image, audio and video input"),
    OldFlag("--mllm-draft-block-size", True, "image, audio and video input"),
    OldFlag("--default-mllm-draft", False, "image, audio and video input"),
    OldFlag("--max-audio-upload-mb", True, "audio input"),
    OldFlag("--max-tts-input-chars", True, "speech output"),
    OldFlag("--mcp-config", True, "tool servers (MCP)"),
    OldFlag("--rate-limit", True, "rate limits"),
    OldFlag("--embedding-model", True, "embeddings"),
    OldFlag("--embedding-max-length", True, "embeddings"),
    OldFlag("--embedding-overflow-policy", True, "embeddings"),
    OldFlag("--rerank-model", True, "reranking"),
)


class _Notice(argparse.Action):
    """Collects one line for a flag that has no effect."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        notices = getattr(namespace, "notices", [])
        namespace.notices = [*notices, f"{option_string} has no effect: {self.const}"]


class _Refusal(argparse.Action):
    """Ends the command for a flag whose feature is missing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        raise ConfigError(f"{option_string}: not supported yet ({self.const})")


class _QuantisePages(argparse.Action):
    """`--kv-cache-quantization` and `--kv-cache-quantization-bits`: names of before for `--kv-cache-dtype`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if self.nargs == 0:
            namespace.quantise_pages = getattr(namespace, "quantise_pages", None) or "int8"
            return
        if values not in ("4", "8"):
            raise ConfigError(f"{option_string}: {values!r} is not 4 or 8")
        namespace.quantise_pages = f"int{values}"


def add_old_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parser understand old flags; lines to print end up in `namespace.notices`."""
    parser.add_argument(
        "--disable-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    for flags, action in ((NO_LONGER_NEEDED, _Notice), (NOT_SUPPORTED_YET, _Refusal)):
        for old in flags:
            parser.add_argument(
                old.name,
                action=action,
                nargs=None if old.takes_value else 0,
                const=old.notice,
                dest="notices",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
    for name, takes_value in (("--kv-cache-quantization", False), ("--kv-cache-quantization-bits", True)):
        parser.add_argument(
            name,
            action=_QuantisePages,
            nargs=None if takes_value else 0,
            dest="quantise_pages",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def apply_old_flags(namespace: argparse.Namespace) -> None:
    """Set what old flags stand for.

    Raises:
        ConfigError: a new flag says otherwise.
    """
    dtype = getattr(namespace, "quantise_pages", None)
    if dtype is None:
        return
    if getattr(namespace, "kv_cache_dtype", dtype) != dtype:
        raise ConfigError(
            f"--kv-cache-quantization means --kv-cache-dtype {dtype}, but --kv-cache-dtype {namespace.kv_cache_dtype} "
            "is given too; leave one out"
        )
    namespace.kv_cache_dtype = dtype
