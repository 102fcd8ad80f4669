"""Kimi K2.5: a small checkpoint with random weights as published ones are, and the oracle."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.reference import remote_kimi_vl
from tests.reference.kernels import kernels_found
from tests.reference.kimi_vl import SPECIAL_TOKENS, KimiOracle, Published, write
from tests.reference.rotary import turned_in_pytorch

SIDE: Final = 96
"""Patches on a side above which a picture is scaled down; 512 in published checkpoints."""
PICTURE: Final = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
_MEDIA: Final = {
    "in_patch_limit": 1600,
    "in_patch_limit_each_frame": None,
    "in_patch_limit_video": None,
    "patch_limit_on_one_side": SIDE,
    "fixed_output_tokens": None,
    "patch_size": 14,
    "merge_kernel_size": 2,
    "temporal_merge_kernel_size": 4,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _finish(folder: Path, config: Any) -> None:
    text = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    told = config.to_dict() | {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "dtype": "float32",
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "text_config": config.text_config.to_dict() | text,
    }
    (folder / "config.json").write_text(json.dumps(told, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": _MEDIA}))


KIMI_K25: Final = Published(
    "mm_projector",
    {"in_proj": "proj.0", "out_proj": "proj.2"},
    [token.replace("media_start", "media_begin") for token in SPECIAL_TOKENS],
    PICTURE,
    _finish,
)


def build(folder: Path, *, seed: int = 6) -> None:
    """A model whose vision encoder has 8 blocks, and whose text model has experts."""
    write(folder, KIMI_K25, seed)


@contextmanager
def prepared() -> Iterator[None]:
    """Around the start of an engine on a CPU."""
    with kernels_found(), turned_in_pytorch():
        yield


class ImageProcessor(remote_kimi_vl.KimiVLImageProcessor):
    """Kimi-VL's, which scales down what would be too long or too wide."""

    def _patches(self, image: Any) -> Any:
        patch, limit = self.patch_size, self.in_token_limit
        patches = max(1, image.width // patch) * max(1, image.height // patch)
        longest = SIDE * patch
        scale = min(1, (limit / patches) ** 0.5, longest / image.width, longest / image.height)
        size = (max(1, int(side * scale)) for side in image.size)
        return super()._patches(image.resize(tuple(size), 3))


class KimiK25Oracle(KimiOracle):
    def processor(self, told: dict[str, Any]) -> ImageProcessor:
        return ImageProcessor(in_token_limit=told["media_proc_cfg"]["in_patch_limit"])
