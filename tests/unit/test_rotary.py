"""No position of any accepted prompt leaves the table of rotary embeddings."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiprune_vllm.engine.positions import PrunedMRopeModel
from hiprune_vllm.engine.rotary import last_end
from hiprune_vllm.engine.wire import BUDGET_FIELD, pack_item
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.positions import positions_taken

TEXT, IMAGE, VIDEO = 7, 1, 2


def budget(full, keep):
    return ImageBudget.of(
        full, keep, method="attention", alpha=0.0, buffer="none", object_layer=0, score="global"
    )


class Model:
    """As much of the worker's model as computes positions."""

    get_mrope_input_positions = PrunedMRopeModel.get_mrope_input_positions

    def iter_mm_grid_thw(self, features):
        for feature in features:
            yield feature.mm_position.offset, *feature.grid


@st.composite
def prompts(draw):
    """Token ids and features of text, pictures (pruned or not) and videos in any order."""
    ids, features = [], []
    for kind in draw(st.lists(st.sampled_from("tiv"), min_size=1, max_size=6)):
        if kind == "t":
            ids += [TEXT] * draw(st.integers(1, 9))
            continue
        rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        frames = draw(st.integers(1, 6)) if kind == "v" else 1
        per_frame = draw(st.sampled_from((0.0, 0.5, 1.0, 2.0, 97.3))) if kind == "v" else 1.0
        full = frames * rows * columns
        one = budget(full, draw(st.integers(1, full)) if kind == "i" else full)
        row = SimpleNamespace(data=torch.tensor(pack_item(one, "x")))
        features.append(
            SimpleNamespace(
                modality="image" if kind == "i" else "video",
                mm_position=SimpleNamespace(offset=len(ids), length=one.keep),
                data={BUDGET_FIELD: row} if kind == "i" else {},
                grid=(frames, rows, columns, per_frame),
            )
        )
        ids += [IMAGE if kind == "i" else VIDEO] * one.keep
    return [*ids, TEXT], features


@given(prompt=prompts(), answer=st.integers(0, 50), rows=st.integers(1, 400))
def test_what_is_accepted_never_reaches_the_end_of_the_table(prompt, answer, rows):
    ids, features = prompt
    positions, delta = Model().get_mrope_input_positions(ids, features)
    media = [(one.mm_position.length, positions_taken(*one.grid)) for one in features]
    longest = len(ids) + answer
    end = last_end(len(ids), media, longest)
    # Rows and columns inside of pictures are added in the worker, up to the whole grid's.
    inside = [
        int(positions[0, one.mm_position.offset]) + max(one.grid[1], one.grid[2]) - 1
        for one in features
    ]
    largest = max(int(positions.max()), longest - 1 + delta, *inside, 0)
    assert largest < end  # so what ends within the table stays in it
    if end <= rows:
        assert largest < rows
    if answer:
        assert largest == end - 1  # and nothing that would fit is refused


@pytest.mark.parametrize(
    ("trained", "pictures", "columns", "fits"),
    [
        (512, 7, 200, True),
        (512, 11, 200, False),  # ended the engine at a prompt of 53 tokens
        (128_000, 213, 1800, True),
        (128_000, 284, 1800, False),  # copies of one picture of 50,000 x 252 pixels
    ],
)
def test_many_long_pictures_of_one_token_are_refused(trained, pictures, columns, fits):
    prompt = 42 + pictures
    media = [(1, columns)] * pictures
    assert (last_end(prompt, media, longest=trained) <= 4 * trained) is fits
