"""Which page holds what: ids, names and counts; never arrays."""
