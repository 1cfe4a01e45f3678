"""Conversation to tokens, tokens to events: the only place where text and the engine meet."""
