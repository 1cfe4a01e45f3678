"""How calls are written by models: readers of JSON, elements, Python calls, shared by the formats."""
