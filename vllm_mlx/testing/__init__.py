"""Stand-ins that need no model and no device; shipped, so that users can test their own code against the server."""
