"""Load generator for any server that speaks the OpenAI dialect. It knows nothing of the inside of our own."""
