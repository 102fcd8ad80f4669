"""The only home of vLLM internals: version gate, registration, processing, model classes."""
