"""From a model argument to a folder on disk. No MLX here."""
