"""OpenCode, over chat completions. Keys: https://opencode.ai/docs/config.

`OPENCODE_CONFIG` names a file that is laid over the user's own config.
"""

from vllm_mlx.cli.client import Client

CLIENT = Client(
    name="opencode",
    title="OpenCode",
    executable="opencode",
    install="npm install -g opencode-ai",
    environment={"OPENCODE_CONFIG": "$folder/opencode.json", "VLLM_MLX_API_KEY": "$key"},
    files={
        "opencode.json": {
            "$$schema": "https://opencode.ai/config.json",
            "model": "vllm-mlx/$model",
            "small_model": "vllm-mlx/$model",
            "autoupdate": False,
            # without it one more result of a tool would be too much
            "compaction": {"auto": True, "reserved": "$result"},
            "provider": {
                "vllm-mlx": {
                    "npm": "@ai-sdk/openai-compatible",
                    "name": "vllm-mlx",
                    "options": {"baseURL": "$url/v1", "apiKey": "{env:VLLM_MLX_API_KEY}", "timeout": False},
                    "models": {
                        "$model": {
                            "name": "$model",
                            "limit": {"context": "$context", "input": "$input", "output": "$output"},
                        }
                    },
                }
            },
        }
    },
)
