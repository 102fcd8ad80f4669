"""Reads Q and K of every layer of a Hugging Face vision encoder and turns them into scores.

One mechanism for all architectures: an attention function of our own, registered with
transformers, which every layer calls with the Q and K that it really uses (after rotary embedding
where there is one). It computes what the layer asked for and remembers Q and K.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.vision_utils import get_vision_window_index

from hiprune_vllm.pruning.scores import attention_received, default_object_layer

_NAME = "hiprune_analysis"
_TOWERS = {
    "clip": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
}
_LANGUAGE_MODELS = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


class NotAnalysable(ValueError):
    """The checkpoint has no vision encoder whose attention can be read."""


@dataclass(frozen=True)
class View:
    """One picture as the encoder's layers see it.

    Attributes:
        scores: (layers, rows, columns) float64, attention received in each layer that runs, from
            all tokens (Eq. 2-3); tokens before the picture's own attend but have no column.
        rows, columns: of the token grid.
    """

    scores: np.ndarray

    @property
    def rows(self) -> int:
        return int(self.scores.shape[1])

    @property
    def columns(self) -> int:
        return int(self.scores.shape[2])


_Layers = dict[int, list[tuple[torch.Tensor, torch.Tensor, float]]]
"""By attention module, in the order in which they ran: Q and K (H, T, D) and scale of each call."""


class Encoder:
    """A vision encoder whose attention can be read.

    Args:
        checkpoint: folder or name on the hub: a vision model, or a LLaVA, LLaVA-NeXT or
            Qwen2.5-VL whose tower is taken.
        device: torch device.

    Attributes:
        kind: the configuration's model type.
        output_layer: 1-based, the last block whose output is used.
        default_object_layer: this project's default for the architecture.

    Raises:
        NotAnalysable: the checkpoint cannot be loaded as such.
    """

    def __init__(self, checkpoint: str | Path, *, device: str = "cpu") -> None:
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        try:
            config = AutoConfig.from_pretrained(checkpoint)
            self.kind: str = config.model_type
            self._model, self._processor = _load(checkpoint, config)
        except (OSError, ValueError, KeyError) as error:
            raise NotAnalysable(f"{checkpoint} is not a checkpoint to analyse: {error}") from None
        self._model.to(device).eval()
        self._device = device
        vision = getattr(config, "vision_config", config)
        self._vision = vision
        self.depth: int = getattr(vision, "num_hidden_layers", None) or vision.depth
        self.output_layer = self.depth
        layer = getattr(config, "vision_feature_layer", None)
        if isinstance(layer, int):
            self.output_layer = layer if layer >= 0 else self.depth + 1 + layer
        merging = self.kind.startswith("qwen2_5_vl")
        self.default_object_layer = default_object_layer(self.depth, merging=merging)

    def view(self, picture: Image.Image) -> View:
        """Attention received by the tokens of one picture.

        Raises:
            NotAnalysable: the encoder's attention did not come by.
        """
        inputs = self._inputs(picture)
        recorded: _Layers = {}
        _recording.append(recorded)
        try:
            with torch.no_grad():
                self._run(inputs)
        finally:
            _recording.pop()
        layers = list(recorded.values())[: self.output_layer]
        if len(layers) < self.output_layer:
            raise NotAnalysable(
                f"{self.kind} has {self.output_layer} layers, attention came from {len(layers)}"
            )
        return View(np.stack([self._layer(calls, inputs) for calls in layers]))

    def coverage(self, mask: Image.Image) -> np.ndarray:
        """(rows, columns) share of each token's area that the mask (not zero) covers.

        The mask takes the way of a picture through the processor: same scaling, same crop.
        """
        binary = Image.fromarray((np.asarray(mask.convert("L")) > 0).astype(np.uint8) * 255)
        inputs = self._inputs(binary.convert("RGB"), plain=True)
        rows, columns = self._grid(inputs)
        if "pixel_values_videos" in inputs:
            pixels = inputs["pixel_values_videos"][0, 0]
        else:
            pixels = inputs["pixel_values"]
            pixels = pixels[0] if pixels.ndim == 4 else pixels
        covered = (pixels.float() > 127).double()
        if covered.ndim == 3 and covered.shape[0] == 3:  # (3, H, W): cut into patches
            size = covered.shape[1] // rows, covered.shape[2] // columns
            cut = covered[0, : rows * size[0], : columns * size[1]]
            tokens = cut.reshape(rows, size[0], columns, size[1]).mean((1, 3)).flatten()
        else:  # patches already, in the processor's order
            tokens = covered.reshape(-1, covered.shape[-1]).mean(-1)
            tokens = self._merged(tokens[None])[0] if "image_grid_thw" in inputs else tokens
        found: np.ndarray = tokens[: rows * columns].reshape(rows, columns).cpu().numpy()
        return found

    def _inputs(self, picture: Image.Image, *, plain: bool = False) -> Any:
        options: dict[str, Any] = {"return_tensors": "pt"}
        if plain:
            options |= {"do_normalize": False, "do_rescale": False, "resample": 0}
        if "vjepa" in self.kind:
            frames = [picture.convert("RGB")] * self._vision.tubelet_size
            return self._processor([frames], **options).to(self._device)
        return self._processor(images=picture.convert("RGB"), **options).to(self._device)

    def _run(self, inputs: Any) -> None:
        if "image_grid_thw" in inputs:
            self._model(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        elif "pixel_values_videos" in inputs:
            self._model(inputs["pixel_values_videos"], skip_predictor=True)
        elif "spatial_shapes" in inputs:
            self._model(**inputs)
        else:
            pixels = inputs["pixel_values"]
            self._model(pixels[0, :1] if pixels.ndim == 5 else pixels)  # LLaVA-NeXT's base tile

    def _grid(self, inputs: Any) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        if "image_grid_thw" in inputs:
            merge = self._vision.spatial_merge_size
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            return rows // merge, columns // merge
        if "spatial_shapes" in inputs:
            rows, columns = inputs["spatial_shapes"][0].tolist()
            return rows, columns
        name = "pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"
        height, width = inputs[name].shape[-2:]
        return height // self._vision.patch_size, width // self._vision.patch_size

    def _layer(
        self, calls: list[tuple[torch.Tensor, torch.Tensor, float]], inputs: Any
    ) -> np.ndarray:
        """(rows, columns) scores of one layer; several calls are windows of one picture."""
        query = torch.cat([call[0] for call in calls], dim=1).float()  # (H, T, D)
        key = torch.cat([call[1] for call in calls], dim=1).float()
        rows, columns = self._grid(inputs)
        tokens = rows * columns
        if "spatial_shapes" in inputs:  # padded at the end
            query, key = query[:, :tokens], key[:, :tokens]
        received = self._received(query, key, calls[0][2])
        if "image_grid_thw" in inputs:
            received = self._unwindowed(received, inputs["image_grid_thw"])
        elif "pixel_values_videos" in inputs:
            received = received.reshape(-1, tokens).mean(0)
        else:
            received = received[len(received) - tokens :]
        found: np.ndarray = received.reshape(rows, columns).double().cpu().numpy()
        return found

    @staticmethod
    def _received(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """(T,) from (H, T, D), over the whole picture."""
        heads = query.shape[0]
        sums = attention_received(query[None].transpose(1, 2), key[None].transpose(1, 2), scale)
        return sums[0] / heads

    def _merged(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, patches) -> (B, tokens): mean over the patches that merge into one token."""
        unit = self._vision.spatial_merge_size**2
        return patches.reshape(len(patches), -1, unit).mean(-1)

    def _unwindowed(self, received: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        merged = self._merged(received[None])[0]
        vision = self._vision
        order, _ = get_vision_window_index(
            grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        found = torch.empty_like(merged)
        found[torch.as_tensor(order, device=merged.device)] = merged
        return found


_recording: list[_Layers] = []
"""The recording under way, if there is one: transformers calls `_attend` without a context."""


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """Computes what the layer asks for, and remembers Q and K of the first picture."""
    if _recording:
        scale = float(kwargs.get("scaling") or query.shape[-1] ** -0.5)
        _recording[-1].setdefault(id(module), []).append((query[0], key[0], scale))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _load(checkpoint: str | Path, config: Any) -> tuple[Any, Any]:
    """The vision model and its processor."""
    import transformers  # noqa: PLC0415

    options: dict[str, Any] = {"attn_implementation": _NAME, "dtype": torch.float32}
    kind = config.model_type.removesuffix("_vision_model")
    if kind in _LANGUAGE_MODELS:
        whole = getattr(transformers, _LANGUAGE_MODELS[kind]).from_pretrained(checkpoint, **options)
        model = whole.model.visual if hasattr(whole.model, "visual") else whole.model.vision_tower
        return model, AutoProcessor.from_pretrained(checkpoint).image_processor
    if kind in _TOWERS:
        model = getattr(transformers, _TOWERS[kind]).from_pretrained(checkpoint, **options)
    else:
        model = AutoModel.from_pretrained(checkpoint, **options)
    processor = AutoVideoProcessor if "vjepa" in kind else AutoImageProcessor
    return model, processor.from_pretrained(checkpoint)
