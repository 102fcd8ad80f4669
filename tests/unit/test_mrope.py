"""What the worker tells vLLM's runner about 3-D positions, without an engine."""

import inspect
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from hiprune_vllm.engine.compat import recompute_positions_where_needed
from hiprune_vllm.engine.positions import PrunedMRopeModel
from hiprune_vllm.engine.rotary import PrunedMRopeProcessor
from hiprune_vllm.engine.whole import whole_prompt
from hiprune_vllm.engine.wire import BUDGET_FIELD, pack_item
from hiprune_vllm.pruning.budget import ImageBudget, spread_evenly
from hiprune_vllm.pruning.positions import COLUMNS, LARGEST, encode_positions, no_positions

WIDTH, IMAGE, VIDEO = 8, 7, 8


class OfVllm:
    """A model that numbers tokens as vLLM's do: text, and media of any number of frames."""

    def __init__(self):
        self.config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)
        self.visual = SimpleNamespace(out_hidden_size=WIDTH)

    def get_mrope_input_positions(self, tokens, media):
        pieces, done, position = [], 0, 0
        for medium in [*media, None]:
            offset = len(tokens) if medium is None else medium.mm_position.offset
            text = torch.arange(offset - done).expand(3, -1) + position
            pieces.append(text)
            position += offset - done
            if medium is not None:
                frames, rows, columns = medium.grid
                grid = torch.from_numpy(np.indices((frames, rows, columns)).reshape(3, -1).copy())
                grid[0] = (grid[0] * medium.per_frame).long()
                assert grid.shape[1] == medium.mm_position.length
                pieces.append(grid + position)
                position = int(pieces[-1].max()) + 1
                done = offset + grid.shape[1]
        positions = torch.cat(pieces, dim=1)
        return positions, int(positions.max()) + 1 - len(tokens)


class Model(PrunedMRopeModel, OfVllm):
    """As much of the worker's model as knows positions."""

    __init__ = OfVllm.__init__


@dataclass
class Medium:
    """As much of a feature as is looked at."""

    grid: tuple[int, int, int]
    per_frame: float
    mm_position: PlaceholderRange
    data: dict = field(default_factory=dict)


def budget_field(full, keep, slices=1):
    budget = ImageBudget.of(
        full, keep, method="attention", alpha=0.0, buffer="none", object_layer=0, score="global"
    )
    return {BUDGET_FIELD: SimpleNamespace(data=torch.tensor(pack_item(budget, "x", slices)))}


grids = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
items = st.tuples(st.integers(0, 4), grids, st.booleans(), st.sampled_from([1.0, 2.5, 0.4]))


@given(st.lists(items, max_size=5), st.integers(1, 6), st.data())
def test_positions_are_those_of_the_unpruned_prompt(parts, text, data):
    """Known before anything is encoded but within pruned images, and these with the embeddings."""
    ids, whole_ids, media, whole_media, embeddings, stay = [], [], [], [], [], []

    def write(count, token=1):
        stay.extend(range(len(whole_ids), len(whole_ids) + count))
        ids.extend([token] * count)
        whole_ids.extend([token] * count)

    for before, (frames, h, w), pruned, speed in parts:
        write(before)
        grid, factor = (frames, h, w), speed
        full, slice_ = math.prod(grid), h * w
        keep = data.draw(st.integers(1, full)) if pruned else full
        shares = spread_evenly(keep, frames)
        of_slices = [
            sorted(data.draw(st.permutations(range(slice_)))[:share]) if pruned else range(slice_)
            for share in shares
        ]
        kept = [i * slice_ + index for i, own in enumerate(of_slices) for index in own]
        media.append(
            Medium(
                grid,
                factor,
                PlaceholderRange(len(ids), keep),
                budget_field(full, keep, frames) if pruned else {},
            )
        )
        whole_media.append(Medium(grid, factor, PlaceholderRange(len(whole_ids), full)))
        stay += [len(whole_ids) + index for index in kept]
        ids += [IMAGE] * keep
        whole_ids += [IMAGE] * full
        embedding = torch.zeros(keep, WIDTH)
        columns = (
            torch.cat(
                [
                    encode_positions(torch.tensor(own).long(), w, torch.float32, int(i * factor))
                    for i, own in enumerate(of_slices)
                ]
            )
            if pruned and keep < full
            else no_positions(keep, embedding)
        )
        embeddings.append(torch.cat([embedding, columns], dim=1))
    if data.draw(st.booleans()) or (parts and parts[-1][2]):
        write(text)  # text must follow a pruned image
    if not ids:
        return
    model = Model()
    positions, delta = model.get_mrope_input_positions(ids, media)
    expected, _ = OfVllm().get_mrope_input_positions(whole_ids, whole_media)
    expected = expected[:, stay]
    assert delta == int(expected.max()) + 1 - len(ids)

    same, unchanged, again = model.recompute_mrope_positions(ids, [], positions, len(ids))
    assert (same, again) == ([], delta)
    assert unchanged is positions  # nothing is copied

    _, written, after = model.recompute_mrope_positions(ids, embeddings, positions, 0)
    assert torch.equal(written, expected)
    assert after == delta


def test_tokens_around_embeddings_stay_where_they_are():
    """A placeholder with a start, an end and text between: only its embeddings were cut."""
    mask = torch.tensor([False, True, True, True, False])
    medium = Medium((1, 2, 4), 1.0, PlaceholderRange(2, 5, mask), budget_field(8, 3))
    other = Medium((1, 1, 2), 1.0, PlaceholderRange(8, 2))
    whole = whole_prompt([1, 1, 2, 7, 7, 7, 3, 1, 7, 7, 1], [other, medium])
    assert whole.tokens == [1, 1, 2, *[7] * 8, 3, 1, 7, 7, 1]
    assert whole.places.tolist() == [0, 1, 2, 3, 3, 3, 11, 12, 13, 14, 15]
    moved = {id(one.grid): one.mm_position for one in whole.media}
    first = moved[id(medium.grid)]
    assert (first.offset, first.length) == (2, 10)
    assert first.is_embed.tolist() == [False, *[True] * 8, False]
    assert moved[id(other.grid)] == PlaceholderRange(13, 2)


@pytest.mark.parametrize(("taken", "keep", "fits"), [(LARGEST, 3, True), (LARGEST + 1, 3, False),
                                                     (LARGEST + 1, 8, True)])  # fmt: skip
def test_positions_that_cannot_travel_with_kept_tokens_are_a_400(taken, keep, fits):
    """Frames that are hours apart: what was rounded on the way would leave the rotary table."""

    class Far:
        def get_mrope_input_positions(self, tokens, media):
            return torch.full((3, len(tokens)), taken), 0

    processor = object.__new__(PrunedMRopeProcessor)
    processor.vllm_class = Far
    processor.info = SimpleNamespace(get_hf_config=dict)
    data, placed = budget_field(8, keep, 2), PromptUpdateDetails([VIDEO] * keep)
    if fits:
        assert processor._positions("video", data, placed) == taken
        return
    with pytest.raises(VLLMValidationError, match=f"got {taken}") as refused:
        processor._positions("video", data, placed)
    assert refused.value.parameter == "video_url"


def a_runner(*, computed, features):
    """As much of vLLM's runner as its own `_gather_mm_embeddings` needs, with one request."""
    request = SimpleNamespace(
        prompt_token_ids=[1] * 40,
        num_computed_tokens=computed,
        mrope_position_delta=3,
        mrope_positions=torch.arange(40).repeat(3, 1),
        mm_features=features,
    )
    asked = []

    def recompute(**given):
        asked.append(given["num_computed_tokens"])
        return (
            [item[:, :WIDTH] for item in given["multimodal_embeddings"]],
            given["mrope_positions"],
            3,
        )

    return asked, SimpleNamespace(
        is_multimodal_pruning_enabled=True,
        uses_mrope=True,
        model=SimpleNamespace(recompute_mrope_positions=recompute),
        requests={"one": request},
        input_batch=SimpleNamespace(req_ids=["one"]),
        encoder_cache={},
        _get_encoder_output_from_cache=lambda _: torch.zeros(10, WIDTH + COLUMNS),
        get_model=lambda: SimpleNamespace(
            without_positions=lambda items: [item[:, :WIDTH] for item in items]
        ),
        _calc_mrope_positions=lambda _: None,
        mrope_positions=SimpleNamespace(copy_to_gpu=lambda _: None),
    )


@pytest.mark.parametrize(
    ("computed", "scheduled", "has_image", "shift", "asks"),
    [
        (0, 40, True, 0, True),
        (10, 5, True, 0, True),  # a chunk of the image
        (0, 8, True, 0, True),  # text before it
        (29, 5, True, 0, True),
        (30, 5, True, 0, False),  # text behind it
        (10, 5, True, 1, False),  # a draft model's view: positions are known by then
        (29, 5, True, 1, False),
        (45, 1, True, 0, False),  # decoding
        (0, 40, False, 0, False),
    ],
)
def test_the_runner_recomputes_positions_only_in_steps_with_images(
    monkeypatch, computed, scheduled, has_image, shift, asks
):
    monkeypatch.setattr("vllm.v1.worker.gpu_model_runner.PIN_MEMORY", False)
    stock = inspect.unwrap(GPUModelRunner._gather_mm_embeddings)
    monkeypatch.setattr(GPUModelRunner, "_gather_mm_embeddings", stock)
    recompute_positions_where_needed()
    gather = GPUModelRunner._gather_mm_embeddings
    recompute_positions_where_needed()
    assert GPUModelRunner._gather_mm_embeddings is gather is not stock  # once
    place = PlaceholderRange(offset=20, length=10)
    image = SimpleNamespace(mm_position=place, identifier="x", modality="image")
    asked, runner = a_runner(computed=computed, features=[image] if has_image else [])
    out = SimpleNamespace(
        total_num_scheduled_tokens=scheduled, num_scheduled_tokens={"one": scheduled}
    )
    embeddings, _ = gather(runner, out, shift_computed_tokens=shift)
    if asks or shift:
        assert all(item.shape[1] == WIDTH for item in embeddings)  # without positions
    assert asked == ([computed] if asks else [])
    assert runner.is_multimodal_pruning_enabled
