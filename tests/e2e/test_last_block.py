"""The output block for kept tokens only, against the whole block, in vLLM's own towers."""

import os
from pathlib import Path
from unittest import mock

import pytest

from tests.e2e.offline import in_new_process
from tests.reference import checkpoints, llava_onevision, pixtral, random_llava

QWEN = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}  # pixels a side of a patch
PIXTRAL = {"mistral3": 28, "pixtral": 16}  # pixels a side of a token
ANYRES = ("granite_vision", "llava_onevision")
CASES = ("clip", "siglip", "llava_next", *ANYRES, *QWEN, *PIXTRAL)


def build(name: str, folder: Path) -> None:
    if name == "llava_next":
        checkpoints.build_llava_next(folder)
    elif name == "granite_vision":
        checkpoints.build_llava_next(folder, granite=True)
    elif name == "llava_onevision":
        llava_onevision.build(folder)
    elif name in QWEN:
        checkpoints.build_qwen(name, folder)
    elif name in PIXTRAL:
        pixtral.build(name, folder)
    elif name == "clip":
        random_llava.build(folder)
    else:
        random_llava.build(folder, siglip=True, vision={"image_size": 224})


def inputs(name):
    """A batch of pictures of one and of several sizes, each with another plan; and their sizes."""
    import torch

    generator = torch.Generator().manual_seed(7)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    if name == "llava_next":
        return {
            "pixel_values": [noise(5, 3, 336, 336), noise(3, 3, 336, 336), noise(3, 3, 336, 336)],
            "image_sizes": torch.tensor([[672, 600], [336, 672], [336, 672]]),
        }, [(2600, 320), (1752, 77), (1752, 1752)]
    if name in ANYRES:
        # The first of 4x3 tiles, 93x70 tokens of them, or of 2x2, 54x50.
        scaled = name == "llava_onevision"
        tiles, tall, full = (13, (1536, 1152), 7332) if scaled else (5, (768, 700), 3483)
        pixels = [noise(count, 3, 384, 384) for count in (tiles, 3, 3, tiles)]
        sizes = torch.tensor([tall, (384, 768), (384, 768), tall])
        budgets = [(full, 320), (2214, 77), (2214, 2214), (full, full)]
        return {"pixel_values": pixels, "image_sizes": sizes}, budgets
    if name in QWEN:
        grids = torch.tensor([[1, 16, 20], [1, 8, 12], [1, 16, 20]])
        pixels = noise(int(grids.prod(dim=1).sum()), 2 * 3 * QWEN[name] ** 2)
        sizes = [(80, 27), (24, 24), (80, 40)]
        return {"pixel_values": pixels, "image_grid_thw": grids}, sizes
    if name in PIXTRAL:
        side = PIXTRAL[name]
        pictures = [noise(3, h * side, w * side) for h, w in ((8, 10), (4, 6), (8, 10))]
        return {"pixel_values": pictures}, [(80, 27), (24, 24), (80, 40)]
    side, full = (336, 576) if name == "clip" else (224, 256)
    sizes = [(full, 64), (full, 30), (full, 30), (full, full), (full, 64)]
    return {"pixel_values": noise(5, 3, side, side)}, sizes


def compare(folders):
    """Per family: greatest difference, greatest value, equal kept sets, scorings of a known batch.

    The two ways take turns on the same pictures under identities of their own.
    """
    from hiprune_vllm.pruning import record
    from hiprune_vllm.pruning.budget import ImageBudget
    from loadtests.bench.models import budget_rows, loaded

    plans = [{}, {"score": "cls"}, {"method": "random"}, {"buffer": "square"}, {"alpha": 0.5}]
    found = {}
    for name, folder in folders.items():
        with loaded(Path(folder), dtype="float32", device="cpu", dummy=False) as model:
            batch, sizes = inputs(name)
            budgets = []
            for (full, keep), plan in zip(sizes, plans, strict=False):
                wish = {"method": "hiprune", "alpha": 0.1, "buffer": "cross", "score": "global"}
                wish |= plan if name == "clip" or "score" not in plan else {}
                budgets.append(ImageBudget.of(full, keep, object_layer=3, **wish))
            results, kept = {}, {}
            for way in ("whole", "kept"):
                os.environ["PRUNING_LAST_BLOCK"] = way
                rows = budget_rows(budgets)
                model._kept_before.clear()
                results[way] = model.embed_multimodal(**batch, hiprune_budget=rows)
                kept[way] = [
                    [part.tolist() for part in one.kept] for one in model._kept_before.values()
                ]
            with mock.patch.object(
                record, "attention_received", side_effect=record.attention_received
            ) as scoring:
                again = model.embed_multimodal(**batch, hiprune_budget=rows)
            pairs = list(zip(results["whole"], results["kept"], strict=True))
            found[name] = {
                "lengths": [len(few) for _, few in pairs],
                "difference": max((a - b).abs().max().item() for a, b in pairs),
                "value": max(a.abs().max().item() for a, _ in pairs),
                "kept": kept["whole"] == kept["kept"] and len(kept["kept"]) > 0,
                "scored": scoring.call_count,
                "again": all(a.equal(b) for a, b in zip(results["kept"], again, strict=True)),
            }
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folders = {}
    for name in CASES:
        folder = tmp_path_factory.mktemp(name)
        build(name, folder)
        folders[name] = str(folder)
    return in_new_process(compare, folders)


@pytest.mark.parametrize("name", CASES)
def test_kept_tokens_are_the_same_whether_or_not_the_others_are_computed(compared, name):
    result = compared[name]
    assert result["kept"]
    # The same kernels on fewer rows: a matrix product may add up in another order (fp32).
    assert result["difference"] <= 1e-6 * result["value"]


@pytest.mark.parametrize("name", CASES)
def test_every_picture_gets_as_many_tokens_as_it_was_promised(compared, name):
    _, sizes = inputs(name)
    promised = [keep for _, keep in sizes]
    got = compared[name]["lengths"]
    if name == "llava_next":  # whole pictures have newline tokens, too
        assert got[:2] == promised[:2]
        assert got[2] >= promised[2] - 24
    else:
        assert got == promised


@pytest.mark.parametrize("name", CASES)
def test_pictures_that_are_known_are_not_scored_again(compared, name):
    assert compared[name]["scored"] == 0
    assert compared[name]["again"]
