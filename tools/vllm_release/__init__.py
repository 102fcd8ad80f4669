"""Another release of vLLM than the locked one: an engine of it, and what it changes for us."""
