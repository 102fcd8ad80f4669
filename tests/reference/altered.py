"""Copies of a LLaVA checkpoint whose language model is quantized, and adapters for one."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BITS, GROUP = 4, 32  # as AWQ's checkpoints have them, but for groups of 128
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight columns in one of AWQ's integers
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_awq(source: Path, quantized: Path, dequantized: Path) -> None:
    """Writes a checkpoint with AWQ's 4-bit weights, and one with the same weights as numbers.

    Rounded to the nearest, without AWQ's search for scales. Scales have four significant bits: a
    weight is then exact in bfloat16, and both checkpoints have the same weights in every bit.
    """
    weights = load_file(source / "model.safetensors")
    packed, plain = {}, {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if not (_is_linear(name) and kind == "weight"):
            packed[name] = plain[name] = weight
            continue
        levels, zeros, scales = _quantize(weight.float().t())
        packed[f"{module}.qweight"] = _pack(levels)
        packed[f"{module}.qzeros"] = _pack(zeros)
        packed[f"{module}.scales"] = scales.half()
        steps = (levels - zeros.repeat_interleave(GROUP, 0)) * scales.repeat_interleave(GROUP, 0)
        plain[name] = steps.t().contiguous().to(torch.bfloat16)
    how = {
        "quant_method": "awq", "bits": BITS, "group_size": GROUP, "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["vision_tower", "multi_modal_projector", "lm_head"],
    }  # fmt: skip
    _copy(source, quantized, packed, quantization_config=how)
    _copy(source, dequantized, plain)


def write_lora(source: Path, folder: Path, *, rank: int = 8, scale: float = 0.5) -> None:
    """Writes a random adapter for the language model's attention, in PEFT's format."""
    noise = torch.Generator().manual_seed(7)
    weights, modules = {}, ("q_proj", "v_proj")
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(modules) or not _is_linear(name):
            continue
        rows, columns = weight.shape
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            factor = torch.randn(shape, generator=noise) * (scale / shape[1]) ** 0.5
            weights[f"base_model.model.{module}.lora_{part}.weight"] = factor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "target_modules": list(modules), "bias": "none", "base_model_name_or_path": str(source),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _is_linear(name: str) -> bool:
    return name.startswith("language_model.") and name.split(".")[-2] in _LINEAR


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (inputs, outputs) in [0, 15], zero points and scales (groups, outputs)."""
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    fraction, exponent = torch.frexp(((high - low) / (2**BITS - 1)).clamp(min=1e-6))
    scales = torch.ldexp((fraction * 16).ceil() / 16, exponent)
    zeros = (-low / scales).round().clamp(0, 15)
    levels = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return levels.reshape(weight.shape), zeros, scales


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """(rows, columns) of 4 bits to (rows, columns / 8) int32, in AWQ's order."""
    eights = levels.to(torch.int64).reshape(len(levels), -1, 8)[:, :, list(_ORDER)]
    packed = (eights << torch.arange(0, 32, BITS)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _copy(source: Path, target: Path, weights: dict[str, torch.Tensor], **config: object) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors", "*.md"))
    told = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(told))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
