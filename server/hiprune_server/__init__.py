"""OpenAI-compatible server with a visual-token budget per request, built on vLLM's own server."""
