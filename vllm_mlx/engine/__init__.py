"""Requests become steps: scheduling, supervision and the API side's handle on a running engine. No MLX, no text."""
