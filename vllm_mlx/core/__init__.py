"""Records, protocols, errors and settings that every layer may import. Standard library and msgspec only."""
