"""HiPrune itself: how many tokens stay (`budget`), what each one scores (`scores`, `record`),
who is next to whom (`neighbours`) and which ones stay (`select`).

Imports torch and the standard library, nothing of vLLM, so that it can be read and checked
against the paper (arXiv 2508.00553) on its own. `budget` does not even need torch.
"""
