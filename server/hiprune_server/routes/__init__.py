"""The routes: vLLM's own with budgets in and reports out, and those that vLLM does not have."""
