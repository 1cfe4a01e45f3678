"""A coding agent's conversation in each dialect, to check a server with."""
