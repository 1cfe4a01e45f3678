"""The course of a response: what came before it, the run itself, with its client or without."""
