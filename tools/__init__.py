"""What keeps the project in order and is neither served nor a test: each is a word of the Makefile.

The checks of documents, releases and GPU hosts, the measurement of fidelity, bills of materials,
another release of vLLM, and the training of the demo model.
"""
