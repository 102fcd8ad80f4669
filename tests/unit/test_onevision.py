"""LLaVA-OneVision's grids, with and without tokens that are interpolated; no engine, no weights."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from hiprune_vllm.models.base import Grid
from hiprune_vllm.models.images import Part, Selection
from hiprune_vllm.models.llava_onevision import LlavaOnevisionAdapter
from hiprune_vllm.models.pieces import parts_of
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.select import Region

ONEVISION, TILE = LlavaOnevisionAdapter(), Grid(27, 27)
LARGE, SCALED = (1152, 1536), (70, 93)  # height and width: 3 x 4 tiles, all of them picture
CONFIG = SimpleNamespace(
    vision_config=SimpleNamespace(image_size=384, patch_size=14),
    image_grid_pinpoints=[[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
)


class Model:
    """Of vLLM's model what puts tiles together."""

    config = CONFIG
    image_newline = torch.full((2,), 7.0)
    _merge_image_patch_embeddings = (
        LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings
    )


def budget(keep, full):
    return ImageBudget.of(
        full, keep, method="attention", alpha=0.0, buffer="none", object_layer=0, score="global"
    )


def test_tokens_are_tiles_own_until_nine_tiles_do_not_hold_them():
    small = ONEVISION.grids(CONFIG, (300, 450))
    assert small[0] == TILE._replace(region=Region(0, 27, 0, 27))
    assert len(small) == 3
    assert not any(grid.tiles for grid in small)
    assert len(ONEVISION.grids(CONFIG, (950, 1158))) == 1 + 3 * 4  # 1.1 squared times nine at most
    base, merged = ONEVISION.grids(CONFIG, LARGE)
    assert base == TILE
    assert merged == Grid(*SCALED, weight=9, tiles=(TILE,) * 12)


@pytest.mark.parametrize(
    ("keep", "shares"), [(1, (0, 1)), (4, (0, 4)), (5, (1, 4)), (10, (1, 9)), (7000, (700, 6300))]
)
def test_the_scaled_grid_has_nine_parts_of_ten(keep, shares):
    grids = ONEVISION.grids(CONFIG, LARGE)
    parts = parts_of(grids, budget(keep, 7332))
    assert [part.keep for part in parts] == [share for share in shares if share]
    most = 729 + 70 * 93
    assert [part.keep for part in parts_of(grids, budget(most, 7332))] == [729, 70 * 93]


def test_a_part_of_the_scaled_grid_is_made_of_all_tiles_but_the_base():
    base, merged = parts_of(ONEVISION.grids(CONFIG, LARGE), budget(10, 7332))
    assert ONEVISION.tiles_of(CONFIG, LARGE, base) == slice(0, 1)
    assert ONEVISION.tiles_of(CONFIG, LARGE, merged) == slice(1, 13)
    third = Part(2, 729, Region(0, 27, 0, 27), 3)
    assert ONEVISION.tiles_of(CONFIG, (300, 450), third) == slice(2, 3)


def test_tokens_and_scores_are_interpolated_alike():
    """A tile's patches as a map; bilinear, over the borders of tiles."""
    rows, columns = torch.meshgrid(torch.arange(81.0), torch.arange(108.0), indexing="ij")
    plane = torch.stack([rows, columns], dim=-1)  # a linear map: bilinear keeps it inside
    tiles = plane.view(3, 27, 4, 27, 2).transpose(1, 2).reshape(12, 729, 2)
    found = ONEVISION.interpolated(Model(), LARGE, tiles).view(*SCALED, 2)
    for axis, (before, after) in enumerate(zip((81, 108), SCALED, strict=True)):
        expected = (torch.arange(after) + 0.5) * before / after - 0.5
        got = found.select(1 - axis, 5)[:, axis]
        torch.testing.assert_close(got[1:-1], expected[1:-1], rtol=1e-4, atol=1e-4)
    scores = ONEVISION.interpolated(Model(), LARGE, tiles[..., :1])
    assert torch.equal(scores[:, 0], found.flatten(0, 1)[:, 0])


def test_a_whole_picture_has_a_newline_behind_each_row():
    tokens = torch.zeros(13 * 729, 2)
    whole = ONEVISION.whole(Model(), LARGE, tokens)
    assert len(whole) == 729 + 70 * 94
    assert int((whole[:, 0] == 7).sum()) == 70
    pixels = torch.empty(13, 3, 384, 384, device="meta")
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(LARGE)}
    assert ONEVISION.encoded_tokens(CONFIG, inputs) == len(whole)


def test_kept_tokens_of_a_scaled_grid_are_in_order():
    parts = parts_of(ONEVISION.grids(CONFIG, LARGE), budget(10, 7332))
    kept = tuple(torch.arange(part.keep) for part in parts)
    assert ONEVISION.prompt_order(CONFIG, LARGE, Selection(parts, kept)) is None
    tall = (700, 300)  # two tiles, one above the other, in this order by themselves
    parts = parts_of(ONEVISION.grids(CONFIG, tall), budget(9, 3000))
    kept = tuple(torch.arange(part.keep) for part in parts)
    order = ONEVISION.prompt_order(CONFIG, tall, Selection(parts, kept))
    assert order.tolist() == list(range(9))
