"""The plugin's hooks into vLLM. What it changes there stands in `patches`, and nowhere else."""
