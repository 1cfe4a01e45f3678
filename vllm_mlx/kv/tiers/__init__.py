"""Where pages and states go that memory has no room for: bytes by name, never arrays."""
