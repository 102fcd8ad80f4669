"""One point measured twice on the same server: by this load generator and by `vllm bench serve`.

    python -m loadtests.load.cross_check --tokenizer server/hiprune_server/demo/checkpoint

The same pictures, question, answer length, budget and number of requests at a time, both in turn;
vLLM's program runs in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from loadtests.load import asking
from loadtests.load.__main__ import main as load
from loadtests.load.cells import Asking, plan, server
from loadtests.load.credentials import VARIABLE
from loadtests.load.pictures import Pool

# The `vllm` command does not start with the CPU re-packaging; the function behind it does.
_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
_ROWS = (
    ("requests/s", "rps", "request_throughput", 1.0),
    ("first token p50, ms", "ttft_p50", "p50_ttft_ms", 1000.0),
    ("first token p90, ms", "ttft_p90", "p90_ttft_ms", 1000.0),
    ("between tokens mean, ms", "itl_mean", "mean_itl_ms", 1000.0),
    ("whole request p50, ms", "e2e_p50", "p50_e2el_ms", 1000.0),
    ("whole request p90, ms", "e2e_p90", "p90_e2el_ms", 1000.0),
)
_ANSWER = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Measures twice and shows both; returns 0, or what was not 0 of the two programs."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.load.cross_check")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", required=True, help="folder or name, for vLLM's program")
    parser.add_argument("--budget", default="64")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="both programs in turn")
    parser.add_argument("--out", type=Path, default=Path("build/load-cross-check"))
    given = parser.parse_args(argv)
    given.url = server(given.url)
    rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number in range(given.rounds):
        # Other pictures in each round: nothing is in a cache.
        done = load(
            ["--url", given.url, "--budgets", given.budget, "--concurrency",
             str(given.concurrency), "--requests", str(given.requests), "--duration", "10s",
             "--pictures", str(given.requests + 8 * given.concurrency + 100), "--answer-tokens",
             str(_ANSWER), "--seed", str(number), "--out", str(given.out)]
        )  # fmt: skip
        if done:
            return done
        (ours,) = json.loads((given.out / "results.json").read_text())["cells"]
        cell = json.loads((given.out / "cells" / "00" / "cell.json").read_text())
        rounds.append((ours, bench(given, cell["asking"]["model"])))
    told = _told(rounds)
    print(f"\n{given.budget} tokens, {given.concurrency} at a time, {given.rounds} rounds in turn")
    print("medians (lowest to highest)    here                      vllm bench")
    for name, row in told.items():
        here, there = (_spread(row[side]) for side in ("here", "vllm bench serve"))
        print(f"{name:26}{here:>26}{there:>26}{row['difference']:+9.1%}")
    (given.out / "cross-check.json").write_text(json.dumps(told, indent=1))
    return 0


def _told(rounds: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By metric: both programs' figures of every round, and how far their medians differ."""
    told = {}
    for name, mine, other, scale in _ROWS:
        here = [scale * ours[mine] for ours, _ in rounds]
        there = [float(theirs[other]) for _, theirs in rounds]
        told[name] = {
            "here": here,
            "vllm bench serve": there,
            "difference": median(here) / median(there) - 1,
        }
    return told


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def bench(given: argparse.Namespace, model: str) -> dict[str, Any]:
    """What `vllm bench serve` measures with the pictures of the sweep before it.

    Raises:
        RuntimeError: it failed; the end of what it said is in the message.
    """
    folder = given.out.resolve()
    pool = Pool(folder / "pictures.txt")
    wanted = Asking(model, answer=(_ANSWER, _ANSWER))
    with (folder / "questions.jsonl").open("w") as file:
        # From the end: had the sweep's pictures been cached in spite of all, these were not.
        for number in range(len(pool) - given.requests - given.concurrency, len(pool)):
            body = asking.body(wanted, {}, pool[number], number)
            file.write(json.dumps({"content": body["messages"][0]["content"]}) + "\n")
    extra = {"hiprune": plan(given.budget), "min_tokens": _ANSWER, "temperature": 0}
    command = [
        sys.executable, "-c", _BENCH, "--backend", "openai-chat", "--base-url", given.url,
        "--endpoint", asking.PATH, "--model", model, "--tokenizer", given.tokenizer,
        "--dataset-name", "custom_image", "--dataset-path", str(folder / "questions.jsonl"),
        "--num-prompts", str(given.requests), "--max-concurrency", str(given.concurrency),
        "--num-warmups", str(given.concurrency), "--request-rate", "inf", "--ignore-eos",
        "--custom-output-len", str(_ANSWER), "--extra-body", json.dumps(extra),
        "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99",
        "--save-result", "--result-dir", str(folder), "--result-filename", "bench.json",
        "--disable-tqdm",
    ]  # fmt: skip
    key = os.environ.get(VARIABLE)
    environment = os.environ | ({"OPENAI_API_KEY": key} if key else {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
