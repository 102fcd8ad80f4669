"""d and f: whole servers over HTTP."""

import asyncio
import base64
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from hiprune_server.demo import CHECKPOINT
from loadtests import geometry
from loadtests.bench.measure import Run, in_turn, ratio, spread
from loadtests.bench.prefill import picture
from loadtests.servers import running

BIN = Path(sys.executable).parent
LEVELS = (1, 4, 16, 64)
Wish = dict[str, Any] | None


def throughput(run: Run) -> list[dict[str, Any]]:
    """d: requests per second at rising concurrency, full and pruned, no picture twice."""
    name = f"llava-{run.text or ('1b' if run.device == 'cuda' or run.long else 'small')}"
    checkpoint = geometry.write(name, run.folder / name)
    command = [str(BIN / "hiprune-serve"), str(checkpoint), *_flags(run.dtype, "bench")]
    command += ["--load-format", "dummy"]
    rows = []
    numbers = iter(range(10**6))
    wishes: dict[str, Wish] = {"full": None, "192": {"tokens": 192}, "64": {"tokens": 64}}
    with running(command, run.folder / "throughput.log", _environment()) as url:
        for level in LEVELS:
            count = max(level, 4)
            rates = in_turn(
                {
                    way: partial(_rate, url, level, count, wish, numbers)
                    for way, wish in wishes.items()
                },
                1 if level == max(LEVELS) else max(2, run.rounds // 2),
                warm_up=int(level == 1),
                name=f"d, concurrency {level}",
            )
            rows += [
                {
                    "benchmark": "d",
                    "what": f"requests per second, {name}, concurrency {level}: {way} over full",
                    "target": "> 1",
                    "base_value": spread(rates["full"]),
                    "value": spread(rates[way]),
                    "ratio": ratio(rates[way], rates["full"]),
                }
                for way in ("192", "64")
            ]
    return rows


def overhead(run: Run) -> list[dict[str, Any]]:
    """f: our chat route against vLLM's own server of the same checkpoint, nothing pruned."""
    flags = _flags(run.dtype, "bench")
    ours = [str(BIN / "hiprune-serve"), str(CHECKPOINT), *flags]
    module = "vllm.entrypoints.openai.api_server"
    plain = [sys.executable, "-m", module, "--model", str(CHECKPOINT), *flags]
    environment = _environment()
    without = environment | {"VLLM_PLUGINS": ""}
    numbers = iter(range(10**6))
    with (
        running(ours, run.folder / "ours.log", environment) as our_url,
        running(plain, run.folder / "plain.log", without) as plain_url,
    ):
        urls = {"ours": our_url, "vllm": plain_url}

        def first(url: str) -> Callable[[], float]:
            return lambda: statistics.median(
                asyncio.run(_first_token(url, next(numbers))) for _ in range(10)
            )

        times = in_turn({name: first(url) for name, url in urls.items()}, 2 * run.rounds, name="f")
        rates = in_turn(
            {name: partial(_rate, url, 4, 48, None, numbers) for name, url in urls.items()},
            2 * run.rounds,
            name="f, concurrency 4",
        )
    return [
        {
            "benchmark": "f",
            "what": "time to first token, our route over vLLM's (demo model)",
            "target": "<= 1.01",
            "base_seconds": spread(times["vllm"]),
            "seconds": spread(times["ours"]),
            "ratio": ratio(times["ours"], times["vllm"]),
        },
        {
            "benchmark": "f",
            "what": "requests per second, vLLM's over ours (demo model), concurrency 4",
            "target": "<= 1.01",
            "base_value": spread(rates["ours"]),
            "value": spread(rates["vllm"]),
            "ratio": ratio(rates["vllm"], rates["ours"]),
        },
    ]


def _flags(dtype: str, name: str) -> list[str]:
    return [
        "--served-model-name", name, "--dtype", dtype, "--max-model-len", "2048",
        "--enforce-eager", "--max-num-seqs", "64", "--disable-uvicorn-access-log",
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    return {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"} | os.environ


def _body(number: int, wish: Wish, **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    picture(number).save(file, "jpeg", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {
        "model": "bench",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "What is in this picture?"},
                ],
            }
        ],
        "temperature": 0,
        "max_tokens": 4,
        "ignore_eos": True,
        **({} if wish is None else {"hiprune": wish}),
        **options,
    }


def _rate(url: str, level: int, count: int, wish: Wish, numbers: Any) -> float:
    """Requests per second of `count` requests, `level` at a time."""
    bodies = [_body(next(numbers), wish) for _ in range(count)]

    async def load() -> float:
        waiting = iter(bodies)
        limits = httpx.Limits(max_connections=level)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

            async def client() -> None:
                for body in waiting:
                    (await http.post("/v1/chat/completions", json=body)).raise_for_status()

            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(level)))
            return count / (time.perf_counter() - began)

    return asyncio.run(load())


async def _first_token(url: str, number: int) -> float:
    body = _body(number, None, stream=True)
    async with httpx.AsyncClient(timeout=600) as http:
        began = time.perf_counter()
        took = 0.0
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                # vLLM's first chunk has the role alone, before anything was computed.
                if not took and '"content":"' in line and '"content":""' not in line:
                    took = time.perf_counter() - began
        if not took:
            raise RuntimeError("the stream had no content")
        return took
