"""Every family for the conformance suite: its small checkpoint and its half of the oracle."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from PIL import Image

from tests.photos import photo
from tests.reference import (
    checkpoints,
    gemma3,
    gemma4,
    glm,
    idefics3,
    internvl,
    kimi_k25,
    kimi_vl,
    llava_onevision,
    pixtral,
    random_llava,
)
from tests.reference.llava import LlavaOracle
from tests.reference.llava_next import LlavaNextOracle
from tests.reference.llava_onevision import OnevisionOracle
from tests.reference.oracles import (
    Oracle,
    OracleOfAnyres,
    OracleOfFlatTiles,
    OracleOfOnevision,
    OracleOfParts,
    OracleOfTiles,
)
from tests.reference.qwen import QwenOracle
from tests.reference.rotary import turned_in_pytorch

Pictures = Mapping[str, tuple[str, tuple[int, int]]]
"""Name -> a photograph and the width and height that it is scaled to."""


@dataclass(frozen=True)
class Family:
    """A family to be held to the standing list.

    Attributes:
        build: writes its small checkpoint.
        oracle: of a checkpoint.
        image: what stands for an image in a prompt.
        pictures: one for every kind of grid, four or more; the first is pruned in many ways.
        video: what stands for a video in a prompt; empty where there are none.
        pad: what of `image` becomes its tokens.
        metadata: what its processor wants to know of a video besides.
        options: of its engine.
        environment: of its engine's process, and of its workers'.
        prepared: around the start of its engine, in the engine's process.
        within: of log-probabilities, how far they may be from the oracle's; None where nothing is
            compared but most tokens of the greedy answer.
        modality: what vLLM calls its pictures.
        exact: whether greedy tokens are the oracle's; else they are as close to them as `within`.
    """

    build: Callable[[Path], None]
    oracle: Callable[[Path], Oracle]
    image: str
    pictures: Pictures
    video: str = ""
    pad: str = "<|image_pad|>"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    prepared: Callable[[], AbstractContextManager[Any]] = nullcontext
    within: float | None = 1e-3
    modality: str = "image"
    exact: bool = True

    def item(self, picture: Image.Image) -> Any:
        """A picture as vLLM takes it."""
        if self.modality == "vision_chunk":
            return {"type": "image", "image": picture, "uuid": None}
        return picture

    def picture(self, name: str) -> Image.Image:
        source, size = self.pictures[name]
        return photo(source).resize(size)


@contextmanager
def _tower_in_fp32() -> Any:
    """The vision encoder in fp32 whatever the rest is in: its choice can be compared exactly."""
    from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer
    from vllm.utils.torch_utils import set_default_torch_dtype

    make = Qwen3_VisionTransformer.__init__

    def make_in_fp32(*args: Any, **kwargs: Any) -> None:
        with set_default_torch_dtype(torch.float32):
            make(*args, **kwargs)

    with patch.object(Qwen3_VisionTransformer, "__init__", make_in_fp32):
        yield


_TILES: Final = {
    "landscape": ("chelsea", (451, 300)),
    "square": ("astronaut", (224, 224)),
    "tall": ("rocket", (120, 480)),
    "tiny": ("chelsea", (30, 20)),
}
_ANYRES: Final = {
    "1x2": ("rocket", (672, 336)),
    "landscape": ("chelsea", (451, 300)),  # 2x2 tiles, padded above and below
    "tall": ("coffee", (300, 1000)),
    "narrow": ("rocket", (120, 900)),  # most of 3x1 is padding
    "wide": ("coffee", (1000, 300)),
}
_NINE: Final = {  # the grid of nine tiles' worth of tokens
    "1x1": ("chelsea", (300, 384)),
    "scaled": ("coffee", (1500, 1152)),  # 3x4 tiles, fewer tokens, no two of one patch alone
    "1x2": ("rocket", (700, 300)),
    "scaled, padded": ("hubble", (1100, 2200)),
    "narrow": ("rocket", (120, 900)),
    "tiny": ("chelsea", (30, 20)),
}
_CUT: Final = {  # of four tiles at most, and a thumbnail
    "1x2": ("coffee", (600, 400)),
    "whole": ("astronaut", (224, 224)),
    "2x2": ("hubble", (900, 900)),
    "tiny": ("chelsea", (30, 20)),
    "strip": ("rocket", (41, 8000)),
}
SHAPES: Final = {
    "square": ("astronaut", (224, 224)),
    "landscape": ("chelsea", (451, 300)),
    "wide": ("coffee", (560, 112)),
    "tall": ("rocket", (120, 480)),
    "tiny": ("chelsea", (30, 20)),
    "huge": ("hubble", (2600, 1900)),
    "strip": ("coffee", (8000, 41)),  # rows of more than 256 tokens
}


def _internvl(build: Callable[[Path], None], image: str, **options: Any) -> Family:
    return Family(
        build,
        lambda path: OracleOfFlatTiles(internvl.InternVLOracle(path)),
        image,
        _CUT,
        options={"max_model_len": 8192, **options},
    )


def _qwen(name: str, **own: Any) -> Family:
    return Family(
        partial(checkpoints.build_qwen, name),
        lambda path: Oracle(QwenOracle(path)),
        "<|vision_start|><|image_pad|><|vision_end|>",
        SHAPES,
        "<|vision_start|><|video_pad|><|vision_end|>",
        **own,
    )


def _pixtral(kind: str) -> Family:
    return Family(
        partial(pixtral.build, kind),
        lambda path: Oracle(pixtral.PixtralOracle(path)),
        pixtral.IMAGE,
        SHAPES,
    )


def _gemma4(**own: Any) -> Family:
    return Family(
        partial(gemma4.build, **own),
        lambda path: Oracle(gemma4.GemmaOracle(path)),
        gemma4.SPECIAL["image_token"],
        {name: SHAPES[name] for name in ("landscape", "square", "wide", "tall", "tiny", "strip")},
    )


# The CPU engine's linear attention is in bf16 alone, and so is the text model: what it answers is
# compared as closely as that allows. With experts, rounding sends tokens to others.
_BF16: Final = {"options": {"dtype": "bfloat16"}, "prepared": _tower_in_fp32}


def _glm(**own: Any) -> Family:
    return Family(
        partial(glm.build, **own),
        lambda path: Oracle(glm.GlmOracle(path)),
        glm.PICTURE,
        {name: of for name, of in SHAPES.items() if name != "huge"},
        "<|begin_of_video|><|video|><|end_of_video|>",
        pad="<|image|>",
        metadata={"duration": 4.0, "do_sample_frames": False},
    )


_CROPS: Final = {
    "landscape": ("chelsea", (640, 300)),  # two crops, half a square each
    "square": ("astronaut", (224, 224)),
    "tall": ("rocket", (260, 1100)),  # four crops
    "tiny": ("chelsea", (30, 20)),
}


def _idefics(name: str) -> Family:
    return Family(
        partial(idefics3.build, name),
        lambda path: OracleOfParts(idefics3.IdeficsOracle(path)),
        idefics3.PICTURE,
        {**_CROPS, "strip": ("rocket", (41, 8000))},
        pad=idefics3.PICTURE,
        options={"max_model_len": 8192},
    )


FAMILIES: Final = {
    "llava": Family(
        random_llava.build, lambda path: OracleOfTiles(LlavaOracle(path)), "<image>", _TILES
    ),
    "llava_next": Family(
        checkpoints.build_llava_next,
        lambda path: OracleOfAnyres(LlavaNextOracle(path)),
        "<image>",
        _ANYRES,
        options={"max_model_len": 12288},
    ),
    "granite_vision": Family(
        partial(checkpoints.build_llava_next, granite=True),
        lambda path: OracleOfAnyres(LlavaNextOracle(path)),
        "<image>",
        _ANYRES,
        options={"max_model_len": 12288},
    ),
    "llava_onevision": Family(
        llava_onevision.build,
        lambda path: OracleOfOnevision(OnevisionOracle(path)),
        "<image>",
        _NINE,
        options={"max_model_len": 16384},
    ),
    "mistral3": _pixtral("mistral3"),
    "ministral3": _pixtral("ministral3"),
    "pixtral": _pixtral("pixtral"),
    "gemma4": _gemma4(),
    "gemma4_moe": _gemma4(experts=True),
    "internvl": _internvl(internvl.build_chat, "<image>", trust_remote_code=True),
    "internvl_hf": _internvl(internvl.build_hf, "<IMG_CONTEXT>"),
    "qwen2_vl": _qwen("qwen2_vl"),
    "qwen2_5_vl": _qwen("qwen2_5_vl"),
    "qwen3_vl": _qwen("qwen3_vl"),
    "qwen3_vl_moe": _qwen("qwen3_vl_moe"),
    "qwen3_5": _qwen("qwen3_5", within=0.6, exact=False, **_BF16),
    "gemma3": Family(
        gemma3.build,
        lambda path: OracleOfParts(gemma3.Gemma3Oracle(path, crops=True)),
        gemma3.PICTURE,
        _CROPS,
        pad=gemma3.PICTURE,
        options={"mm_processor_kwargs": {"do_pan_and_scan": True}},
    ),
    "kimi_vl": Family(
        kimi_vl.build,
        lambda path: Oracle(kimi_vl.KimiOracle(path)),
        kimi_vl.PICTURE,
        {name: of for name, of in SHAPES.items() if name != "strip"}
        | {"narrow": ("coffee", (7100, 27))},
        pad=kimi_vl.PAD,
        options={
            "trust_remote_code": True,
            "worker_extension_cls": "tests.reference.rotary_worker.Extension",
        },
        environment=kimi_vl.ENVIRONMENT,
        prepared=turned_in_pytorch,
    ),
    "kimi_k25": Family(
        kimi_k25.build,
        lambda path: Oracle(kimi_k25.KimiK25Oracle(path)),
        kimi_k25.PICTURE,
        {name: of for name, of in SHAPES.items() if name != "strip"}
        # Of another shape, rounding up would make more tokens than vLLM has room for.
        | {"huge": ("hubble", (3000, 3000)), "narrow": ("coffee", (7100, 27))},
        pad=kimi_vl.PAD,
        options={"worker_extension_cls": "tests.reference.rotary_worker.Extension"},
        environment=kimi_vl.ENVIRONMENT,
        prepared=kimi_k25.prepared,
        modality="vision_chunk",
    ),
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "glm4v": _glm(),
    "glm46v": _glm(newer=True),
    "glm4v_moe": _glm(experts=True),
    "qwen3_5_moe": _qwen("qwen3_5_moe", within=None, exact=False, **_BF16),
}
