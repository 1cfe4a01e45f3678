"""Claude Code, over the Messages API. Variables: https://code.claude.com/docs/en/env-vars."""

from vllm_mlx.cli.client import Client

CLIENT = Client(
    name="claude",
    title="Claude Code",
    executable="claude",
    install="npm install -g @anthropic-ai/claude-code",
    environment={
        "ANTHROPIC_BASE_URL": "$url",
        "ANTHROPIC_AUTH_TOKEN": "$key",
        "ANTHROPIC_MODEL": "$model",
        "ANTHROPIC_SMALL_FAST_MODEL": "$model",
        "ANTHROPIC_DEFAULT_OPUS_MODEL": "$model",
        "ANTHROPIC_DEFAULT_SONNET_MODEL": "$model",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "$model",
        # it would take 200,000 tokens for granted
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "$context",
        # the shorter of this, which may not be less, and the context
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": "$wide",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "$output",
        # the tools of MCP servers are looked up where they would take much of the context, and listed where not
        "ENABLE_TOOL_SEARCH": "auto",
        # a line of the system prompt that changes with every request
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_AUTOUPDATER": "1",
        # a local model may compute a prompt for longer than the 10 minutes that are the default
        "API_TIMEOUT_MS": "3600000",
    },
    unset=("ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY"),
    min_context_tokens=64_000,
)
