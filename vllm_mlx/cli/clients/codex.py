"""Codex, over the Responses API. Keys: https://developers.openai.com/codex/config-reference.

Everything is said on the command line, above the user's own config: sessions, rules and MCP servers stay usable.
"""

from vllm_mlx.cli.client import Client

_PROVIDER = (
    '{name="vllm-mlx", base_url="$url/v1", env_key="VLLM_MLX_API_KEY", wire_api="responses", '
    "stream_idle_timeout_ms=3600000}"
)

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
        "check_for_update_on_startup=false",
        "-c",
        "analytics.enabled=false",
    ),
)
