"""Two workers on two of Ray's nodes, on this machine, keep and answer what one worker does."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.e2e.offline import engine, generate, in_new_process, request
from tests.photos import photo
from tests.routing import free_port

ON_RAY = Path(__file__).parents[1] / "on_ray"
PLANS = (
    None,
    {"tokens": 192},
    {"tokens": 64, "alpha": 0.5},
    {"tokens": 64, "score": "cls"},
    {"tokens": 1, "method": "attention"},
    {"ratio": 0.25, "method": "random"},
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that cores are GPUs"),
]


@contextmanager
def cluster(folder):
    """Environment of an engine in a cluster of two nodes, each with one pretended GPU."""
    path = os.pathsep.join(filter(None, [str(ON_RAY), os.environ.get("PYTHONPATH")]))
    environment = {
        "PYTHONPATH": path,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "HF_HUB_OFFLINE": "1",
    }
    address = f"127.0.0.1:{free_port()}"
    start = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        *("--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=1"),
        *("--object-store-memory=100000000", "--disable-usage-stats"),
    ]
    head = ["--head", f"--port={address.partition(':')[2]}", "--include-dashboard=false"]
    nodes = []
    try:
        for number, flags in enumerate((head, [f"--address={address}"])):
            with (folder / f"node-{number}.log").open("w") as log:
                nodes.append(
                    subprocess.Popen(
                        [*start, *flags], stdout=log, stderr=log, env=os.environ | environment
                    )
                )
            wait_for(folder / f"node-{number}.log", nodes[-1])
        yield environment | {"RAY_ADDRESS": address}
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(timeout=60)


def wait_for(log, process):
    end = time.monotonic() + 180
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(log.read_text())
        time.sleep(0.5)


def run(path, on_ray):
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"} if on_ray else {}
    llm = engine(path, **options)
    config = llm.llm_engine.vllm_config.parallel_config
    requests = [request(photo(name), plan) for name in ("chelsea", "coffee") for plan in PLANS]
    return config.distributed_executor_backend, generate(llm, requests)


def test_workers_of_ray_answer_as_one_worker_does(clip_checkpoint, tmp_path):
    _, expected = in_new_process(run, str(clip_checkpoint), False)
    with cluster(tmp_path) as environment:
        backend, answers = in_new_process(run, str(clip_checkpoint), True, environment=environment)
    assert backend == "ray"
    for mine, theirs in zip(answers, expected, strict=True):
        assert mine["prompt_tokens"] == theirs["prompt_tokens"]
        assert mine["tokens"] == theirs["tokens"]
        torch.testing.assert_close(
            torch.tensor(mine["logprobs"]), torch.tensor(theirs["logprobs"]), atol=2e-3, rtol=1e-3
        )
