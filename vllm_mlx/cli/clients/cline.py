"""Cline's command line, over chat completions. Flags: https://docs.cline.bot/cline-cli.

It keeps its providers in its data folder and nowhere else, so it gets a data folder of its own.
"""

from vllm_mlx.cli.client import Client

CLIENT = Client(
    name="cline",
    title="Cline",
    executable="cline",
    install="npm install -g cline",
    files={
        "settings/providers.json": {
            "version": 1,
            "lastUsedProvider": "openai-compatible",
            "modes": {},
            "providers": {
                "openai-compatible": {
                    "settings": {
                        "provider": "openai-compatible",
                        "apiKey": "$key",
                        "model": "$model",
                        "baseUrl": "$url/v1",
                        # what it may send: it compacts at nine tenths of it, and asks for maxTokens besides
                        "contextWindow": "$input",
                        "maxTokens": "$output",
                        "timeout": 3_600_000,
                    },
                    "updatedAt": "2026-01-01T00:00:00.000Z",
                    "tokenSource": "manual",
                }
            },
        }
    },
    arguments=("--data-dir", "$folder", "--provider", "openai-compatible", "--model", "$model"),
)
