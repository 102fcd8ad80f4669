"""How the demo model was made; `make demo-model` runs it."""
