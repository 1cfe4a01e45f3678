"""Codex, over the Responses API. Keys: https://developers.openai.com/codex/config-reference.

Everything is said on the command line, above the user's own config: sessions, rules and MCP servers stay usable.

What Codex knows of models is a catalogue; of one that is not in it, it warns, offers it no `apply_patch`, and takes at
most 272,000 tokens of context for granted. So it gets a catalogue with the served model: an entry of its own
catalogue, whose instructions and whatever else its version asks for stay, with the facts of a local model in it.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import msgspec

from vllm_mlx.cli.client import Ask, Client, literal

_PROVIDER = (
    '{name="vllm-mlx", base_url="$url/v1", env_key="VLLM_MLX_API_KEY", wire_api="responses", '
    "stream_idle_timeout_ms=3600000}"
)
_CATALOGUE = "models.json"
_FACTS = MappingProxyType(
    {
        "slug": "$model",
        "display_name": "$model",
        "description": "Served by vllm-mlx.",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 1,
        "context_window": "$context",
        "max_context_window": "$context",
        "auto_compact_token_limit": "$compact",
        "apply_patch_tool_type": "freeform",
        "input_modalities": ["text"],
        "supports_parallel_tool_calls": True,
        "supports_reasoning_summary_parameter": True,
        "default_reasoning_summary": "auto",
        # what only OpenAI's own models and servers have
        "default_reasoning_level": None,
        "supported_reasoning_levels": [],
        "support_verbosity": False,
        "default_verbosity": None,
        "prefer_websockets": False,
        "use_responses_lite": False,
        "tool_mode": None,
        "multi_agent_version": None,
        "multi_agent_reasoning_effort": None,
        "supports_search_tool": False,
        "supports_image_detail_original": False,
        "supports_reasoning_effort_updates": False,
        "web_search_tool_type": "text",
        "experimental_supported_tools": [],
        "available_in_plans": None,
        "service_tiers": [],
        "additional_speed_tiers": [],
        "default_service_tier": None,
        "auto_review_model_override": None,
        "comp_hash": None,
        "guardian": None,
        "availability_nux": None,
        "upgrade": None,
    }
)


def _with_catalogue(client: Client, ask: Ask) -> Client:
    """The client with a catalogue, if it tells its own in a form that we know."""
    entry = _plain_entry(ask("debug", "models", "--bundled"))
    if entry is None:
        return client
    return msgspec.structs.replace(
        client,
        files={**client.files, _CATALOGUE: {"models": [{**literal(entry), **_FACTS}]}},
        arguments=(*client.arguments, "-c", f'model_catalog_json="$folder/{_CATALOGUE}"'),
    )


def _plain_entry(told: str | None) -> dict[str, Any] | None:
    """The first model that is given its tools directly; None if there is nothing to go by."""
    try:
        models: list[dict[str, Any]] = json.loads(told or "{}")["models"]
        return next(one for one in models if not one.get("tool_mode") and not one.get("use_responses_lite"))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None


CLIENT = Client(
    name="codex",
    title="Codex",
    executable="codex",
    install="npm install -g @openai/codex",
    environment={"VLLM_MLX_API_KEY": "$key"},
    arguments=(
        "-c",
        'model="$model"',
        "-c",
        'model_provider="vllm-mlx"',
        "-c",
        f"model_providers.vllm-mlx={_PROVIDER}",
        "-c",
        "model_context_window=$context",
        "-c",
        "model_auto_compact_token_limit=$compact",
        "-c",
        "tool_output_token_limit=$result",
        "-c",
        "check_for_update_on_startup=false",
        "-c",
        "analytics.enabled=false",
    ),
    min_context_tokens=24_000,
    refine=_with_catalogue,
)
