"""What clients send and receive, as records; and the way between them and the core's own records."""
