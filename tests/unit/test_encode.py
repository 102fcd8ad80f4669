"""Pooling of patches, shares of parts, and a family of merged tiles that none of ours has."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hiprune_vllm.models.base import Batch, FamilyAdapter, Grid, Tower
from hiprune_vllm.models.encode import check_tower, encode
from hiprune_vllm.models.images import Image, Selection
from hiprune_vllm.models.pieces import parts_of, pooled, rows_of
from hiprune_vllm.plan import Encoder
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.select import Region, kept_indices

WIDTH, MERGE, GRID = 8, 2, Grid(3, 4)


def budget(keep, full=24, method="hiprune"):
    return ImageBudget.of(
        full, keep, method=method, alpha=0.5, buffer="cross", object_layer=1, score="global"
    )


def tower(blocks=(), **options):
    return Tower(blocks, "attn.attn", "attn.qkv", heads=1, **options)


def patches_by_hand(token, *, raster):
    """Patches of a token of `GRID`, two by two."""
    if not raster:
        return [token * 4 + i for i in range(4)]
    row, column = divmod(token, GRID.columns)
    return [(row * 2 + i) * GRID.columns * 2 + column * 2 + j for i in range(2) for j in range(2)]


@pytest.mark.parametrize("raster", [True, False])
@pytest.mark.parametrize("leading", [0, 1])
def test_a_token_is_the_mean_of_its_patches_and_finds_them_again(raster, leading):
    one = tower(merge=MERGE, raster=raster, leading=leading)
    values = torch.arange(48.0) ** 2
    expected = [
        sum(float(values[i]) for i in patches_by_hand(token, raster=raster)) / 4
        for token in range(12)
    ]
    assert pooled(values, GRID, one).tolist() == expected
    tokens = torch.tensor([7, 0, 11])
    rows = [leading + i for t in tokens.tolist() for i in patches_by_hand(t, raster=raster)]
    assert rows_of(tokens, GRID, one).tolist() == rows


def test_tokens_in_another_order_are_pooled_and_found_in_theirs():
    one, places = tower(merge=MERGE, raster=False), torch.randperm(12)
    values = torch.rand(48)
    tokens = pooled(values, GRID, one, places)
    for token in range(12):
        rows = rows_of(torch.tensor([token]), GRID, one, places)
        torch.testing.assert_close(values[rows].mean(), tokens[token])


def test_parts_share_what_is_kept_and_padding_gets_nothing():
    grids = [GRID, Grid(3, 4, Region(0, 0, 0, 0)), Grid(3, 4, Region(1, 2, 0, 2))]
    parts = parts_of(grids, budget(9, full=14))
    assert [(part.number, part.full, part.keep) for part in parts] == [(0, 12, 7), (2, 12, 2)]
    whole = parts_of(grids, budget(40, full=40))
    assert [part.keep for part in whole] == [12, 12, 12]
    assert all(part.region == Region(0, 3, 0, 4) for part in whole)


class Attention(nn.Module):
    num_heads, head_size, scale = 1, WIDTH, 1.0
    attn_backend = SimpleNamespace(name="TORCH_SDPA")

    def forward(self, query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv, self.attn.attn = nn.Linear(WIDTH, 3 * WIDTH), Attention()
        self.attn.qkv.register_forward_hook(
            lambda _, args, out: out if isinstance(out, tuple) else (out, None)
        )

    def forward(self, x):
        made, _ = self.attn.qkv(x)
        x = x + self.attn.attn(*made.chunk(3, dim=-1))
        return x + torch.tanh(x)


def batch_of(pixels):
    return Batch(list(pixels), [()] * len(pixels))


class MergedTiles(FamilyAdapter):
    """Two square tiles a picture with a CLS token, 2x2 patches a token, row by row."""

    def encoder(self, hf_config):
        return Encoder("merged", 2, 1, has_cls=True)

    def tokens(self, info, images, index, options):
        raise NotImplementedError

    encoded_tokens = views = tokens

    def grids(self, hf_config, shape):
        return [GRID, GRID]

    def tower(self, model):
        return tower(model.blocks, leading=1, merge=MERGE)

    def batch(self, model, **kwargs):
        raise NotImplementedError

    def forward(self, model, batch, parts):
        states = torch.cat([
            pixels[[part.number for part in of_image]]
            for pixels, of_image in zip(batch.pixels, parts, strict=True)
        ])  # fmt: skip
        for block in model.blocks:
            states = block(states)
        return states[0, 1:].view(-1, MERGE**2 * WIDTH)


@pytest.mark.parametrize("last_block", ["kept", "whole"])
@torch.no_grad()
def test_merged_tiles_are_pruned_as_by_hand(last_block, monkeypatch):
    monkeypatch.setenv("PRUNING_LAST_BLOCK", last_block)
    torch.manual_seed(0)
    model = SimpleNamespace(blocks=nn.ModuleList([Block(), Block()]), config=None)
    pixels = torch.randn(4, 2, 49, WIDTH) * 2
    budgets = [budget(9), budget(24), budget(1), budget(9, method="stride")]
    images = [Image(one) for one in budgets]
    got = encode(MergedTiles(), model, batch_of(pixels), images, None)
    for one, picture, encoded in zip(budgets, pixels, got, strict=True):
        parts = parts_of([GRID, GRID], one)
        rows = []
        for i, part in enumerate(parts):
            states, of_layers = picture[part.number], []
            for block in model.blocks:
                query, key, _ = block.attn.qkv(states)[0].chunk(3, dim=-1)
                received = (query @ key.T).softmax(dim=-1).sum(dim=0)[1:]
                of_layers.append(
                    torch.stack([
                        received[patches_by_hand(token, raster=True)].mean() for token in range(12)
                    ])[None]
                )  # fmt: skip
                states = block(states[None])[0]
            kept = kept_indices(
                one.part(12, part.keep, part.number),
                count=12, columns=4, batch=1, device=states.device,
                object_scores=of_layers[0], output_scores=of_layers[1],
            )[0]  # fmt: skip
            if encoded.selection is not None:
                assert encoded.selection.kept[i].tolist() == kept.tolist()
            rows += [states[1:][patches_by_hand(t, raster=True)].flatten() for t in kept.tolist()]
        torch.testing.assert_close(encoded.embeddings, torch.stack(rows), rtol=1e-5, atol=1e-5)
        assert (encoded.selection is None) is one.is_full

    # A picture that is known keeps its tokens, whatever its scores would say now.
    other = Selection(got[0].selection.parts, tuple(torch.arange(n) for n in (5, 4)))
    (again,) = encode(MergedTiles(), model, batch_of(pixels[:1]), [Image(budgets[0], other)], None)
    assert again.selection.kept == other.kept


def test_a_tower_of_another_depth_is_version_drift():
    model = SimpleNamespace(blocks=nn.ModuleList([Block()]), config=None)
    with pytest.raises(RuntimeError, match="version drift: expected 2 encoder blocks, got 1"):
        check_tower(MergedTiles(), model)
    model.blocks.append(Block())
    check_tower(MergedTiles(), model)
