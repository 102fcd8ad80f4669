"""Load and quality tests: clients of a running server, over HTTP only."""
