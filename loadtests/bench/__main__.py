"""Benchmarks of the engine side, each in a process of its own, side by side with vLLM alone."""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from loadtests.bench.measure import Run
from loadtests.bench.suite import BENCHMARKS, measure
from loadtests.machine import multiplies_bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="such as a,b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", help="default: bfloat16 where there are instructions for it, else float32"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--long", action="store_true", help="also the sizes that take a CPU hours; with --device "
        "cuda always",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a without its batch of 8")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: computing time on one "
        "thread, for a machine that is not idle (a, b, c, e)",
    )  # fmt: skip
    parser.add_argument("--text", choices=("small", "1b", "7b"), help="text model in c, d and e")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    asked = parser.parse_args()
    names = asked.only.split(",")
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"--only must be of {','.join(BENCHMARKS)}, got {','.join(sorted(unknown))}")
    cuda = asked.device == "cuda"
    dtype = asked.dtype or ("bfloat16" if cuda or multiplies_bfloat16() else "float32")
    asked.folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if asked.clock == "cpu":
        os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    how = Run(
        asked.folder,
        dtype,
        asked.device,
        asked.rounds,
        asked.long or cuda,
        asked.quick,
        asked.clock,
        asked.text,
    )
    for name in names:
        began = time.monotonic()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(measure, name, how).result()
        print(f"{name}: {time.monotonic() - began:.0f} s")
    print((asked.folder / "bench.md").read_text())


if __name__ == "__main__":
    main()
