"""A small task in lmms-eval's format, without a download: held-out pictures of the demo model."""

import argparse
import json
from pathlib import Path
from string import Template

from loadtests.quality.asking import pictures

_TASK = Path(__file__).parent / "task"


def write(folder: Path, questions: int) -> int:
    """Writes task, code and data into `folder`, to be given as `--include-path`.

    Args:
        folder: made where it is not there.
        questions: at least so many; those of a picture stay together.

    Returns:
        number of questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / "questions.jsonl"
    lines = [
        json.dumps({"picture": one.url.split(",")[1], "question": text, "answer": answer})
        for one in pictures(questions)
        for text, answer, _ in one.questions
    ]
    data.write_text("\n".join(lines) + "\n")
    (folder / "utils.py").write_text((_TASK / "utils.py").read_text())
    task = Template((_TASK / "demo_shapes.yaml").read_text()).substitute(data=json.dumps(str(data)))
    (folder / "demo_shapes.yaml").write_text(task)
    return len(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m loadtests.quality.lmms.local")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    given = parser.parse_args()
    print(f"{write(given.folder, given.questions)} questions in {given.folder}")
