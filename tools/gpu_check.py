"""`make gpu-check`: everything that needs a GPU, one after the other (docs/gpu-checklist.md)."""

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "gpu-check"
PICTURE = ROOT / "server/hiprune_server/demo/samples/shapes-1.jpg"
START_S = 3600
PORT = 8765
OK, FAILED, SKIPPED = "ok", "FAILED", "not run"


def run(name: str, *command: str) -> str:
    """Runs a command, its output to the terminal and to a file."""
    with (OUT / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            log.write(line)
    return FAILED if process.wait() else OK


def device() -> str:
    """What is there."""
    code = (
        "import torch, vllm; p = torch.cuda.get_device_properties(0); "
        "print(p.name, f'{p.total_memory / 2**30:.0f} GiB, CUDA', torch.version.cuda, "
        "'torch', torch.__version__, 'vllm', vllm.__version__)"
    )
    return run("device", sys.executable, "-c", code)


def kernels() -> str:
    return run("kernels", "make", "test-gpu", f"PYTHON={sys.executable}")


def e2e() -> str:
    return run("e2e", sys.executable, "-m", "pytest", "-n", "1", "--dist", "loadfile", "tests/e2e")


def fidelity() -> str:
    return run("fidelity", sys.executable, "-m", "tools.fidelity")


def bench() -> str:
    return run("bench", "make", "bench-gpu", f"PYTHON={sys.executable}")


def checkpoint(model: str) -> str:
    """A real model, a third of a picture's tokens, and all of them."""
    if not reachable():
        print("the model hub cannot be reached")
        return SKIPPED
    serve = Path(sys.executable).parent / "hiprune-serve"
    with (OUT / "checkpoint.log").open("w") as log:
        server = subprocess.Popen(
            [serve, model, "--host=127.0.0.1", f"--port={PORT}", "--max-model-len=4096"],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            if not came_up(server):
                return FAILED
            return OK if all([asked(model, {}), asked(model, {"ratio": 1 / 3})]) else FAILED
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=120)


def reachable() -> bool:
    try:
        with urlopen("https://huggingface.co/api/models?limit=1", timeout=10):
            return True
    except (URLError, OSError):
        return False


def came_up(server: "subprocess.Popen[bytes]") -> bool:
    end = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < end:
        try:
            with urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return True
        except OSError:
            time.sleep(2)
    print(f"the server did not start: {OUT / 'checkpoint.log'}")
    return False


def asked(model: str, plan: dict[str, float]) -> bool:
    """Whether an answer comes, and says that as many tokens were kept as were asked for."""
    url = f"data:image/jpeg;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is in this picture?"},
    ]
    body = {"model": model, "max_tokens": 64, "temperature": 0, "hiprune": plan}
    body["messages"] = [{"role": "user", "content": parts}]
    request = Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=300) as answer:
        told = json.load(answer)
    (image,) = told["hiprune"]["images"]
    print(plan, image, told["usage"]["prompt_tokens"], told["choices"][0]["message"]["content"])
    wanted = round(plan.get("ratio", 1) * image["tokens_full"])
    return bool(abs(image["tokens_kept"] - wanted) <= 1)


def main() -> int:
    """Runs the steps; 0 where none failed, 1 where one did, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--list", action="store_true", help="the steps, and stop")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
    given = parser.parse_args()
    steps: dict[str, Callable[[], str]] = {
        "device": device,
        "kernels": kernels,
        "e2e": e2e,
        "fidelity": fidelity,
        "bench": bench,
        "checkpoint": lambda: checkpoint(given.model),
    }
    if given.list:
        print("\n".join(steps))
        return 0
    unknown = set(given.only or ()) - set(steps)
    if unknown:
        parser.error(f"--only takes {', '.join(steps)}, got {', '.join(sorted(unknown))}")
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, PyTorch found none", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.only or steps:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        try:
            verdict = steps[name]()
        except Exception as error:  # the others are worth running all the same
            print(f"{type(error).__name__}: {error}")
            verdict = FAILED
        rows.append(f"{name:<12}{verdict:<10}{time.monotonic() - began:>8.0f} s")
    table = "\n".join(rows)
    print(f"\n{table}")
    (OUT / "summary.txt").write_text(table + "\n")
    return 1 if any(FAILED in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
