"""The analysis of the demo model, whose pictures tell where the objects are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from hiprune_server import demo
from hiprune_server.demo.world import HELD_OUT, PATCH, scene
from hiprune_vllm.analysis.__main__ import main

PICTURES = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures and masks as files, as a user would have them."""
    pictures, masks = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("masks")
    for seed in range(PICTURES):
        one = scene(HELD_OUT + seed)
        one.picture.save(pictures / f"{seed:02}.png")
        Image.fromarray(one.mask().astype(np.uint8) * 255).save(masks / f"{seed:02}.png")
    return pictures, masks


@pytest.fixture(scope="module")
def on_objects():
    """Per layer that runs, how much more often than chance its top tenth lies on objects."""
    llava = LlavaForConditionalGeneration.from_pretrained(
        demo.CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    )
    hits, chance = [], []
    for seed in range(PICTURES):
        one = scene(HELD_OUT + seed)
        tiles = one.mask().reshape(24, PATCH, 24, PATCH).mean((1, 3)).reshape(-1)
        pixels = torch.from_numpy(np.array(one.picture, dtype=np.float32)).permute(2, 0, 1)
        with torch.no_grad():
            seen = llava.model.vision_tower(pixels[None] / 127.5 - 1, output_attentions=True)
        found = []
        for layer in seen.attentions[:8]:
            received = layer[0].mean(0).sum(0)[1:]
            found.append((tiles[received.topk(58).indices.numpy()] > 0.12).mean())
        hits.append(found)
        chance.append((tiles > 0.12).mean())
    return np.mean(hits, 0) / np.mean(chance)


def analysed(tmp_path, *arguments):
    command = [str(demo.CHECKPOINT), *map(str, arguments), "--out", str(tmp_path)]
    assert main(command) == 0
    return json.loads((tmp_path / "analysis.json").read_text())


def test_with_masks_the_layer_that_looks_at_objects_is_proposed(folders, on_objects, tmp_path):
    pictures, masks = folders
    found = analysed(tmp_path, pictures, "--masks", masks)
    best = int(np.argmax(on_objects[:-1])) + 1
    assert found["proposal"]["layer"] == best
    assert found["proposal"]["sure"]
    assert np.allclose(np.array(found["overlap"]) / found["chance"], on_objects, rtol=0.05)
    assert {"attention.png", "similarity.png", "dispersion.png", "ranks.png", "overlap.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert f"Proposed object layer: {best}" in (tmp_path / "report.html").read_text()


def test_without_masks_the_proposal_says_what_it_rests_on(folders, tmp_path):
    found = analysed(tmp_path, folders[0])
    assert "dispersion" in found["proposal"]["reason"]
    assert 1 <= found["proposal"]["layer"] < found["output_layer"]
