"""Anthropic's dialect: bodies, answers and stream of the Messages API (https://platform.claude.com/docs/en/api/messages)."""
