"""One thin adapter a model family: only what differs from vLLM's own class."""
