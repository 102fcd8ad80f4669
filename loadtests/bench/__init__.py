"""`make bench`: what pruning costs and gains, side by side with vLLM alone."""
