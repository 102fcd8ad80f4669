"""`make demo-model`: trains the demo model, or goes on with it, and writes the checkpoint."""

import argparse
import os
import platform
import sys
from pathlib import Path

from hiprune_server.demo import CHECKPOINT, SAMPLES
from tools.demo_training import checkpoint, encoder, text
from tools.demo_training.progress import Progress
from tools.demo_training.words import WORDS

STAGES = {"encoder": 53.0, "features": 5.0, "text": 42.0}
"""Names and usual shares of the time."""
PICTURES = 250


def main() -> None:
    """Runs all stages; a folder with their state makes an interrupted run go on."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_training")
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, metavar="DIR")
    parser.add_argument("--samples", type=Path, default=SAMPLES, metavar="DIR")
    given = parser.parse_args()
    progress = Progress(given.work, STAGES)
    trained = encoder.train(progress)
    llava = text.train(trained, progress, given.work)
    checkpoint.assemble(llava, trained)
    checkpoint.save(llava, given.out)
    checkpoint.save_samples(given.samples)
    print(f"asking about {PICTURES} held-out pictures", file=sys.stderr)
    right = checkpoint.questions_right(given.out, PICTURES)
    about = [count for kind, count in right.items() if kind not in ("unknown", "describe")]
    good, asked = (sum(column) for column in zip(*about, strict=True))
    weights = given.out / "model.safetensors"
    checkpoint.write_card(
        given.out,
        right=right,
        facts={
            "words": str(len(WORDS)),
            "parameters": f"{sum(p.numel() for p in llava.parameters()) / 1e6:.2f} million",
            "size": f"{weights.stat().st_size / 1e6:.1f}",
            "pictures": str(PICTURES),
            "total": f"{good} of {asked}",
            "share": f"{100 * good / asked:.1f}",
            "machine": f"{os.cpu_count()} cores ({platform.machine()}, no GPU)",
            "minutes": f"{progress.minutes():.0f}",
            "lessons": f"{text.PICTURES:,}",
        },
    )
    print(f"exact match {good} of {asked}; wrote {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
