"""Qwen Code, over chat completions. Keys: https://qwenlm.github.io/qwen-code-docs/en/users/configuration/settings.

Its file of system settings is laid over the user's own; a variable says where that file is.
"""

from vllm_mlx.cli.client import Client

CLIENT = Client(
    name="qwen",
    title="Qwen Code",
    executable="qwen",
    install="npm install -g @qwen-code/qwen-code",
    environment={
        "QWEN_CODE_SYSTEM_SETTINGS_PATH": "$folder/settings.json",
        "VLLM_MLX_API_KEY": "$key",
        "OPENAI_API_KEY": "$key",
        "OPENAI_BASE_URL": "$url/v1",
        "OPENAI_MODEL": "$model",
    },
    files={
        "settings.json": {
            "modelProviders": {
                "openai": [
                    {
                        "id": "$model",
                        "name": "$model",
                        "envKey": "VLLM_MLX_API_KEY",
                        "baseUrl": "$url/v1",
                        "generationConfig": {
                            "contextWindowSize": "$context",
                            "timeout": 3_600_000,
                            "streamIdleTimeoutMs": 3_600_000,
                            "samplingParams": {"max_tokens": "$output"},
                        },
                    }
                ]
            },
            "model": {"name": "$model"},
            "security": {"auth": {"selectedType": "openai"}},
            "privacy": {"usageStatisticsEnabled": False},
            "general": {"enableAutoUpdate": False},
        }
    },
    arguments=("--auth-type", "openai", "--model", "$model"),
)
