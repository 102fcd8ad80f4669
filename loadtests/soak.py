"""`make soak`: whether the server's memory stays flat under load.

A demo server of our own, clients that never ask about the same picture twice, and the memory of
all the server's processes over time.
"""

import argparse
import base64
import io
import json
import os
import random
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from hiprune_server.demo.world import scene
from loadtests.demo import demo_server

EVERY_S = 10
SMALL_CACHES = ("--mm-processor-cache-gb", "0.25", "--num-gpu-blocks-override", "512")
"""Memory that is meant to fill up does so within the warm-up: 0.25 GiB each."""
GROWTH = 0.03
"""Share by which memory may grow from the end of the warm-up to the end."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("build/soak"))
    asked = parser.parse_args()
    with demo_server(asked.folder, *SMALL_CACHES) as url:
        result = soak(url, asked.seconds, asked.concurrency)
    (asked.folder / "soak.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key != "memory_mib"}))
    if result["errors"] or result["growth"] > GROWTH:
        raise SystemExit(f"errors, or memory grew by more than {GROWTH:.0%} after the warm-up")


def soak(url: str, seconds: int, concurrency: int) -> dict[str, Any]:
    """Loads the server at `url`; the first quarter of the time is the warm-up.

    Returns:
        Requests, errors, `memory_mib` (time in s and what `used` says) and
        `growth`, the share by which the median of the last quarter is above that of the second.
    """
    numbers, began = count(), time.monotonic()
    done: list[bool] = []

    def client() -> None:
        with httpx.Client(timeout=120) as http:
            while time.monotonic() - began < seconds:
                answer = http.post(f"{url}/v1/chat/completions", json=request(next(numbers)))
                done.append(answer.status_code == httpx.codes.OK)

    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    memory: list[tuple[float, float]] = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(EVERY_S)
        memory.append((round(time.monotonic() - began), round(used(), 1)))
        print(
            f"{memory[-1][0]:5.0f} s  {len(done):6d} requests  {memory[-1][1]:8.1f} MiB", flush=True
        )
    quarter = len(memory) // 4
    warm = float(np.median([mib for _, mib in memory[quarter : 2 * quarter]]))
    end = float(np.median([mib for _, mib in memory[-quarter:]]))
    return {
        "requests": len(done),
        "errors": done.count(False),
        "seconds": seconds,
        "concurrency": concurrency,
        "after_warm_up_mib": warm,
        "at_the_end_mib": end,
        "growth": round(end / warm - 1, 4),
        "memory_mib": memory,
    }


def request(number: int) -> dict[str, Any]:
    """One of many kinds of requests, about a picture that no other has."""
    dice = random.Random(number)
    picture = scene(number % 500).picture
    noise = np.random.default_rng(number).integers(-3, 4, (picture.height, picture.width, 3))
    pixels = np.clip(np.asarray(picture, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    data = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    plan = {"tokens": dice.choice([16, 64, 192, 576]), "method": dice.choice(["hiprune", "random"])}
    content = [
        {"type": "text", "text": "What is in this picture?"},
        {"type": "image_url", "image_url": {"url": data}},
    ]
    return {
        "model": "hiprune-demo",
        "max_tokens": 40,
        "temperature": 0,
        "stream": dice.random() < 0.5,
        "messages": [{"role": "user", "content": content}],
        "hiprune": plan,
    }


def used() -> float:
    """Memory of all processes below this one, MiB: what they allocated, shared parts counted once.

    Pages of files (libraries, the checkpoint) are left out: their share depends on who else on
    this machine has the same files open.
    """
    total = 0
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            told = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        sizes = dict(line.split(":", 1) for line in told.splitlines() if line.startswith("Pss_"))
        total += sum(int(sizes[kind].split()[0]) for kind in ("Pss_Anon", "Pss_Shmem"))
    return total / 2**10


if __name__ == "__main__":
    main()
