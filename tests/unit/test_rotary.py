"""No position of any accepted prompt leaves the table of rotary embeddings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import PlaceholderRange

from hiprune_vllm.engine.rotary import last_end
from tests.unit.test_mrope import Medium, Model, OfVllm, budget_field

TEXT, IMAGE, VIDEO = 7, 1, 2


def positions_taken(medium):
    """Of a medium alone, where text behind it would stand."""
    full = medium.grid[0] * medium.grid[1] * medium.grid[2]
    alone = Medium(medium.grid, medium.per_frame, PlaceholderRange(0, full))
    positions, _ = OfVllm().get_mrope_input_positions([IMAGE] * full + [TEXT], [alone])
    return int(positions[0, -1])


@st.composite
def prompts(draw):
    """Token ids and media of text, pictures (pruned or not) and videos in any order."""
    ids, media = [], []
    for kind in draw(st.lists(st.sampled_from("tiv"), min_size=1, max_size=6)):
        if kind == "t":
            ids += [TEXT] * draw(st.integers(1, 9))
            continue
        rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        frames = draw(st.integers(1, 6)) if kind == "v" else 1
        per_frame = draw(st.sampled_from((0.0, 0.5, 1.0, 2.0, 97.3))) if kind == "v" else 1.0
        full = frames * rows * columns
        keep = draw(st.integers(1, full)) if kind == "i" else full
        media.append(
            Medium(
                (frames, rows, columns),
                per_frame,
                PlaceholderRange(len(ids), keep),
                budget_field(full, keep) if kind == "i" else {},
            )
        )
        ids += [IMAGE if kind == "i" else VIDEO] * keep
    return [*ids, TEXT], media


@given(prompt=prompts(), answer=st.integers(0, 50), rows=st.integers(1, 400))
def test_what_is_accepted_never_reaches_the_end_of_the_table(prompt, answer, rows):
    ids, media = prompt
    positions, delta = Model().get_mrope_input_positions(ids, media)
    taken = [(one.mm_position.length, positions_taken(one)) for one in media]
    longest = len(ids) + answer
    end = last_end(len(ids), taken, longest)
    # Rows and columns inside of pictures are added in the worker, up to the whole grid's.
    inside = [int(positions[0, one.mm_position.offset]) + max(one.grid[1:]) - 1 for one in media]
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
