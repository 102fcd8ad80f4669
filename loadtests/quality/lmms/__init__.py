"""lmms-eval's benchmarks against a running server with a budget, and its logs as our report.

`evaluate` and `client` run in lmms-eval's own environment, `collect` and `local` in the project's.
"""
