"""Last stage: the finished model as a LLaVA checkpoint with its card and sample pictures."""

import json
import shutil
from pathlib import Path
from string import Template
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessor, LlavaProcessor

from hiprune_server.demo.world import HELD_OUT, PATCH, SIDE, scene
from tools.demo_training.encoder import EXECUTED, VISION, Encoder
from tools.demo_training.words import CHAT_TEMPLATE, tokenizer

SAMPLES = (33, 7, 12, 14)
"""Held-out scenes that ship as pictures to try."""
MAX_NEW_TOKENS = 64


def assemble(llava: Any, encoder: Encoder) -> None:
    """Puts the trained tower into LLaVA; blocks that never run become the identity."""
    tower = llava.model.vision_tower
    tower.load_state_dict(encoder.tower.state_dict())
    blocks = getattr(tower, "vision_model", tower).encoder.layers
    for block in blocks[EXECUTED:]:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


def save(llava: Any, folder: Path) -> None:
    """Writes the checkpoint: weights in float16 under the names of real LLaVA checkpoints.

    The configuration asks for float32, which CPUs compute faster.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    llava.generation_config.max_new_tokens = MAX_NEW_TOKENS
    llava.generation_config.eos_token_id = llava.config.text_config.eos_token_id
    llava.config.save_pretrained(folder)
    llava.generation_config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(
        {public_name(name): tensor.half() for name, tensor in llava.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def public_name(name: str) -> str:
    """Name of a weight in published LLaVA checkpoints."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name.replace("lm_head.", "language_model.lm_head.", 1)


def save_samples(folder: Path) -> None:
    """Writes the sample pictures and what can be asked about them."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {}
    for number, seed in enumerate(SAMPLES, 1):
        one = scene(HELD_OUT + seed)
        name = f"shapes-{number}.jpg"
        one.picture.save(folder / name, quality=88)
        told[name] = [[question.text, question.answer] for question in one.questions()]
    (folder / "questions.json").write_text(json.dumps(told, indent=1) + "\n")


def questions_right(folder: Path, pictures: int) -> dict[str, tuple[int, int]]:
    """Exact matches of the saved checkpoint: Hugging Face, greedy, all visual tokens.

    Args:
        folder: the checkpoint.
        pictures: held-out pictures, from HELD_OUT on.

    Returns:
        kind of question -> (right, asked).
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    counts: dict[str, list[int]] = {}
    for seed in range(HELD_OUT, HELD_OUT + pictures):
        one = scene(seed)
        asked = one.questions() + one.more_questions()
        messages = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}]
            for q in asked
        ]
        inputs = processor(
            text=[processor.apply_chat_template(m) for m in messages],
            images=[one.picture] * len(asked),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        with torch.no_grad():
            out = llava.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        said = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for question, answer in zip(asked, said, strict=True):
            count = counts.setdefault(question.kind, [0, 0])
            count[0] += answer.strip() == question.answer
            count[1] += 1
    return {kind: (right, asked) for kind, (right, asked) in sorted(counts.items())}


def write_card(folder: Path, *, right: dict[str, tuple[int, int]], facts: dict[str, str]) -> None:
    """The model card: the text below with what was measured."""
    rows = "\n".join(
        f"| {kind} | {good} of {asked} | {100 * good / asked:.1f} % |"
        for kind, (good, asked) in right.items()
    )
    template = Template((Path(__file__).parent / "card.md").read_text())
    card = template.substitute(
        rows=rows,
        layers=VISION.num_hidden_layers,
        **facts,
    )
    (folder / "README.md").write_text(card)
