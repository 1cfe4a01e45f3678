"""The command line, and the place where the layers are put together."""
