"""Where a vision encoder looks, layer by layer.

`python -m hiprune_vllm.analysis CHECKPOINT IMAGES` writes a report.
`encoders` reads the attention of any Hugging Face vision encoder, `measure` turns it into the
numbers of the paper's Figures 2-4 and Table 1 and proposes an object layer, `report` writes it
down.
"""
