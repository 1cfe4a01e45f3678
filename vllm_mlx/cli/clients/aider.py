"""aider, over chat completions, through litellm. Flags: https://aider.chat/docs/config/options.html."""

from vllm_mlx.cli.client import Client

CLIENT = Client(
    name="aider",
    title="aider",
    executable="aider",
    install="python -m pip install aider-install && aider-install",
    environment={"OPENAI_API_BASE": "$url/v1", "OPENAI_API_KEY": "$key"},
    files={
        "models.json": {
            "openai/$model": {
                "max_tokens": "$output",
                "max_input_tokens": "$context",
                "max_output_tokens": "$output",
                "input_cost_per_token": 0,
                "output_cost_per_token": 0,
                "litellm_provider": "openai",
                "mode": "chat",
            }
        }
    },
    arguments=(
        "--model",
        "openai/$model",
        "--weak-model",
        "openai/$model",
        "--model-metadata-file",
        "$folder/models.json",
        "--no-show-model-warnings",
        "--no-check-update",
        "--no-analytics",
        "--timeout",
        "3600",
    ),
)
