"""The embedded demo model: a LLaVA in small that knows coloured shapes and number cards.

`world` draws its pictures and `language` asks about them; `tools/demo_training` of the
repository made the weights in `checkpoint`, whose README is the model card.
"""

from pathlib import Path

NAME = "hiprune-demo"
CHECKPOINT = Path(__file__).parent / "checkpoint"
SAMPLES = Path(__file__).parent / "samples"
"""Pictures to try, with `questions.json`: file name -> [question, answer] pairs."""
