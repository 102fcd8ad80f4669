"""The analysis of new encoders: scores of every architecture, measures, the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTImageProcessor,
    DeiTModel,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
)

from hiprune_vllm.analysis import measure
from hiprune_vllm.analysis.__main__ import main
from hiprune_vllm.analysis.encoders import Encoder, NotAnalysable
from tests.reference.checkpoints import build_qwen2_5_vl
from tests.reference.qwen import QwenOracle
from tests.reference.random_llava import build

QWEN_DEPTH = 8
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
}


def spread(model):
    """Random weights whose attention differs from token to token."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "position" not in name:
                weight.normal_(0, 2 * weight.shape[1] ** -0.5)
    return model


def clip(folder):
    config = CLIPVisionConfig(**SIZE, image_size=56, patch_size=14)
    spread(CLIPVisionModel(config)).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)


def siglip(folder):
    config = SiglipVisionConfig(**SIZE, image_size=56, patch_size=14)
    spread(SiglipVisionModel(config)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)


def siglip2(folder):
    config = Siglip2VisionConfig(**SIZE, num_patches=16, patch_size=14)
    spread(Siglip2VisionModel(config)).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=14, max_num_patches=20).save_pretrained(folder)


def deit(folder):
    spread(DeiTModel(DeiTConfig(**SIZE, image_size=56, patch_size=14))).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    DeiTImageProcessor(size=size, crop_size=size).save_pretrained(folder)


def vjepa2(folder):
    config = VJEPA2Config(
        hidden_size=48,
        num_attention_heads=2,
        num_hidden_layers=4,
        crop_size=56,
        patch_size=14,
        frames_per_clip=4,
        tubelet_size=2,
        pred_hidden_size=48,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
    )
    spread(VJEPA2Model(config)).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    VJEPA2VideoProcessor(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)


ARCHITECTURES = {
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "deit": deit,
    "vjepa2": vjepa2,
    "qwen2_5_vl": build_qwen2_5_vl,
    "llava": build,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {}
    for name, write in ARCHITECTURES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write(folders[name])
    return folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three landscapes with their masks."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        noise = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((180, 120)).save(folder / f"{number}.png")
        mask = np.zeros((120, 180), dtype=np.uint8)
        mask[:60, :90] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_command_analyses_every_architecture(name, checkpoints, pictures, tmp_path, capsys):
    arguments = [str(checkpoints[name]), str(pictures), "--masks", str(pictures / "masks")]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "analysis.json").read_text())
    layers = found["output_layer"]
    assert layers == found["depth"] - (name == "llava")
    assert len(found["dispersion"]) == len(found["overlap"]) == layers
    assert np.shape(found["rank_similarity"]) == (layers, layers)
    assert 1 <= found["proposal"]["layer"] < layers
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 5
    assert "http" not in page
    assert "object layer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clip", "siglip", "deit"])
def test_scores_are_what_transformers_own_attention_says(name, checkpoints, pictures):
    """Prefix tokens attend, but have no score of their own."""
    kind = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "deit": DeiTModel}[name]
    encoder = Encoder(checkpoints[name])
    picture = Image.open(pictures / "0.png")
    seen = encoder.view(picture)
    model = kind.from_pretrained(checkpoints[name], attn_implementation="eager").eval()
    pixels = encoder._processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        attentions = model(pixels, output_attentions=True).attentions
    assert seen.scores.shape == (4, 4, 4)
    for layer, attention in zip(seen.scores, attentions, strict=True):
        expected = attention[0].mean(0).sum(0)[-16:].reshape(4, 4)
        assert np.allclose(layer, expected.numpy(), atol=1e-5)


def test_scores_of_a_windowed_encoder_are_over_the_whole_picture(checkpoints, pictures):
    """Qwen2.5-VL: windows are put together, the permutation undone, patches merged."""
    picture = Image.open(pictures / "0.png").resize((168, 112))
    seen = Encoder(checkpoints["qwen2_5_vl"]).view(picture)
    assert (seen.rows, seen.columns) == (4, 6)
    assert len(seen.scores) == QWEN_DEPTH
    oracle = QwenOracle(checkpoints["qwen2_5_vl"])
    for layer, scores in enumerate(seen.scores, 1):
        expected = np.array(oracle.scores(picture, layer)).reshape(4, 6)
        assert np.allclose(scores, expected, atol=1e-4)


def test_a_picture_wider_than_high_has_more_columns_than_rows(checkpoints, pictures):
    for name in ("siglip2", "qwen2_5_vl"):
        seen = Encoder(checkpoints[name]).view(Image.open(pictures / "0.png"))
        assert seen.columns > seen.rows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mask_takes_the_way_of_its_picture(name, checkpoints, pictures):
    """Its top left quarter stays at the top left, whatever is scaled, cropped or permuted."""
    covered = Encoder(checkpoints[name]).coverage(Image.open(pictures / "masks" / "0.png"))
    rows, columns = covered.shape
    assert covered[0, 0] > 0.9
    assert covered[: rows // 2, : columns // 3].mean() > 0.85
    assert covered[(rows + 1) // 2 :].mean() < 0.15
    assert covered[:, (2 * columns + 2) // 3 :].mean() < 0.15


def test_dispersion_tells_a_cluster_from_a_scatter():
    scores = np.zeros((2, 10, 10))
    scores[0, :3, :3] = 1
    scores[1, ::3, ::3] = 1
    near, far = measure.dispersion(scores, 0.09)
    assert near < 0.4
    assert far > 0.9


def test_the_mean_distance_of_all_tokens_is_one():
    scores = np.random.default_rng(0).random((1, 7, 5))
    assert measure.dispersion(scores, 1.0)[0] == pytest.approx(1.0)


def test_overlap_counts_top_tokens_on_objects():
    scores = np.arange(100.0).reshape(1, 10, 10)
    coverage = np.zeros((10, 10))
    coverage[9, 5:] = 0.5
    coverage[9, 4] = 0.1  # too little of it
    assert measure.overlap(scores, coverage, 0.1)[0] == pytest.approx(0.5)


def test_equal_orders_are_similar_and_opposite_ones_are_not():
    up = np.random.default_rng(0).random((4, 4))
    similarity = measure.rank_similarity(np.stack([up, up * 3 + 1, -up]))
    assert similarity[0, 1] == pytest.approx(1)
    assert similarity[0, 2] == pytest.approx(-1)


def test_masks_choose_the_layer_on_objects_and_never_the_output_layer():
    rng = np.random.default_rng(0)
    hits = rng.uniform(0.05, 0.1, (20, 6))
    hits[:, 2] += 0.5
    hits[:, 5] += 0.9
    proposal = measure.propose_by_overlap(hits, np.full(20, 0.05), default=2)
    assert proposal.layer == 3
    assert proposal.sure
    assert "chance" in proposal.reason


def test_layers_that_cannot_be_told_apart_leave_the_default():
    hits = np.random.default_rng(0).uniform(0.3, 0.5, (10, 8))
    proposal = measure.propose_by_overlap(hits, np.full(10, 0.1), default=4)
    assert proposal.layer == 4
    assert "cannot be told" in proposal.reason


def test_without_masks_a_dip_of_dispersion_is_proposed_and_a_flat_curve_is_not():
    dip = np.full((5, 24), 1.0)
    dip[:, 7] = 0.5
    assert measure.propose_by_dispersion(dip, default=9).layer == 8
    flat = measure.propose_by_dispersion(np.full((5, 24), 1.0), default=9)
    assert (flat.layer, flat.sure) == (9, False)


def test_the_default_layer_scales_with_depth(checkpoints):
    assert Encoder(checkpoints["clip"]).default_object_layer == round(9 / 24 * 4)
    assert Encoder(checkpoints["qwen2_5_vl"]).default_object_layer == QWEN_DEPTH // 2


def test_wrong_input_is_told_plainly(checkpoints, pictures, tmp_path, capsys):
    def told(*arguments):
        assert main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "config.json").write_text("{}")
    model = checkpoints["clip"]
    assert "no pictures in" in told(model, tmp_path / "empty")
    assert "does not exist" in told(model, tmp_path / "nowhere")
    assert "not a readable picture" in told(model, tmp_path / "broken.png")
    assert "every picture needs a mask" in told(model, pictures, "--masks", tmp_path)
    assert "not a checkpoint to analyse" in told(tmp_path, pictures)


def test_an_encoder_whose_attention_does_not_come_by_is_refused(checkpoints, pictures):
    encoder = Encoder(checkpoints["clip"])
    encoder._model.set_attn_implementation("eager")
    with pytest.raises(NotAnalysable, match="attention came from 0"):
        encoder.view(Image.open(pictures / "0.png"))
