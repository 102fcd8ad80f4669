"""Load and quality tests, and benchmarks.

`load`, `quality` and `soak` are clients of a running server, over HTTP only. `bench` also runs
parts of the engine and of the plugin by themselves.
"""
