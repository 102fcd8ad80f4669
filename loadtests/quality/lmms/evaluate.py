"""Runs lmms-eval once for every budget: `python -m loadtests.quality.lmms.evaluate --help`.

Each budget gets a folder of its own with lmms-eval's logs; a finished one is not run again. The
server's API key is read from EVAL_API_KEY.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CLIENT = "loadtests.quality.lmms.client.HiPrune"
DONE = "budget.json"
KEPT = "kept.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or the first exit status of lmms-eval that is not 0."""
    if argv is None and sys.argv[1:2] == ["--one-run"]:
        _lmms_eval(sys.argv[2:])
        return 0
    given = _arguments(argv)
    for number, budget in enumerate(given.budgets, 1):
        folder = given.out / budget
        if (folder / DONE).is_file():
            _say(f"budget {budget}: already in {folder}")
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _say(f"budget {budget} ({number} of {len(given.budgets)}): {','.join(given.tasks)}")
        status = subprocess.run(_command(given, budget, folder), check=False).returncode
        if status:
            _say(f"lmms-eval stopped with status {status}; the same command tries again from here")
            return status
        about = {"budget": budget, "tasks": given.tasks, "model": given.model, "knobs": given.knob}
        (folder / DONE).write_text(json.dumps(about) + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.quality.lmms.evaluate", description=__doc__
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the running server")
    parser.add_argument("--model", required=True, help="its served model name")
    parser.add_argument("--tasks", nargs="+", required=True, help="lmms-eval's names")
    parser.add_argument(
        "--budgets", nargs="+", default=["full", "192", "128", "64"],
        help="visual tokens for each image, a ratio below 1, or full",
    )  # fmt: skip
    parser.add_argument(
        "--knob", nargs="*", default=[], metavar="NAME=VALUE", help="further fields of the budget"
    )
    parser.add_argument("--out", type=Path, default=Path("build/lmms"))
    parser.add_argument("--include-path", type=Path, help="folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="questions of each task, for a try")
    parser.add_argument("--concurrency", type=int, default=32)
    given = parser.parse_args(argv)
    for budget in given.budgets:
        try:
            _fields(budget)
        except ValueError:
            parser.error(f"--budgets takes tokens >= 1, ratios in (0, 1) or full, got {budget!r}")
    for knob in given.knob:
        if "=" not in knob or "," in knob:
            parser.error(f"--knob takes NAME=VALUE, got {knob!r}")
    return given


def _fields(budget: str) -> list[str]:
    """The budget's fields as lmms-eval's model arguments."""
    if budget == "full":
        return []
    if "." in budget:
        if not 0 < float(budget) < 1:
            raise ValueError(budget)
        return [f"hiprune_ratio={budget}"]
    if int(budget) < 1:
        raise ValueError(budget)
    return [f"hiprune_tokens={budget}"]


def _command(given: argparse.Namespace, budget: str, folder: Path) -> list[str]:
    model_args = [
        f"base_url={given.url.rstrip('/')}/v1",
        f"model={given.model}",
        f"kept_log={folder / KEPT}",
        f"num_concurrent={given.concurrency}",
        "timeout=600",
        *_fields(budget),
    ]
    if budget != "full":
        model_args += [f"hiprune_{knob}" for knob in given.knob]
    command = [sys.executable, "-m", "loadtests.quality.lmms.evaluate", "--one-run"]
    command += ["--model", "hiprune", "--model_args", ",".join(model_args)]
    command += ["--tasks", ",".join(given.tasks), "--batch_size", "1"]
    command += ["--log_samples", "--output_path", str(folder)]
    if given.include_path:
        command += ["--include_path", str(given.include_path)]
    if given.limit:
        command += ["--limit", str(given.limit)]
    return command


def _lmms_eval(arguments: list[str]) -> None:
    """lmms-eval's command line in this process, where it knows our client."""
    from lmms_eval.__main__ import cli_evaluate  # noqa: PLC0415
    from lmms_eval.models import MODEL_REGISTRY_V2  # noqa: PLC0415
    from lmms_eval.models.registry_v2 import ModelManifest  # noqa: PLC0415

    MODEL_REGISTRY_V2.register_manifest(ModelManifest("hiprune", chat_class_path=CLIENT))
    sys.argv = ["lmms-eval", *arguments]
    cli_evaluate()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
