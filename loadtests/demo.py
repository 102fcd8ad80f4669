"""Servers of the demo model, for programs that need one of their own."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hiprune_server.demo import CHECKPOINT
from loadtests.servers import running


@contextmanager
def demo_server(folder: Path, *flags: str) -> Iterator[str]:
    """URL of a demo server of our own, until the block ends."""
    with _serving(["--demo", *flags], folder / "server.log") as url:
        yield url


@contextmanager
def downscaled_server(side: int, folder: Path) -> Iterator[str]:
    """URL of a demo server whose encoder sees pictures of `side` x `side` patches."""
    checkpoint = folder / f"downscaled-{side}"
    downscale(side, checkpoint)
    flags = ["--served-model-name", "hiprune-demo", "--max-model-len", "4096"]
    flags += ["--enforce-eager", "--dtype", "float32"]
    with _serving([str(checkpoint), *flags], folder / f"server-{side}.log") as url:
        yield url


def downscale(side: int, target: Path) -> None:
    """Writes a copy of the demo checkpoint for smaller pictures.

    The position embeddings of the patches are interpolated (bicubic), as is customary; the model
    was not trained on such pictures.

    Args:
        side: patches on a side of the picture.
        target: folder, replaced.
    """
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(CHECKPOINT, target)
    config = json.loads((target / "config.json").read_text())
    pixels = side * config["vision_config"]["patch_size"]
    config["vision_config"]["image_size"] = pixels
    config["image_seq_length"] = side * side
    (target / "config.json").write_text(json.dumps(config))
    for path in target.glob("*processor_config.json"):
        text = json.loads(path.read_text())
        images = text.get("image_processor", text)
        if "crop_size" in images:
            images["crop_size"] = {"height": pixels, "width": pixels}
            images["size"] = {"shortest_edge": pixels}
        path.write_text(json.dumps(text))
    weights = load_file(target / "model.safetensors")
    (name,) = [one for one in weights if one.endswith("position_embedding.weight")]
    cls, patches = weights[name][:1].float(), weights[name][1:].float()
    grid = round(len(patches) ** 0.5)
    square = patches.T.reshape(1, -1, grid, grid)
    small = torch.nn.functional.interpolate(square, (side, side), mode="bicubic", antialias=True)
    weights[name] = torch.cat([cls, small.flatten(2)[0].T]).half().contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def weights() -> str:
    """What tells the demo model's weights from those of another training."""
    return hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:16]


@contextmanager
def _serving(arguments: Sequence[str], log: Path) -> Iterator[str]:
    program = Path(sys.executable).parent / "hiprune-serve"
    command = [str(program), *arguments, "--disable-uvicorn-access-log"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    with running(command, log, environment) as url:
        yield url
