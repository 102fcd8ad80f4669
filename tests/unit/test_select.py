import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiprune_vllm.pruning.budget import BUFFERS, METHODS, ImageBudget, anchor_count
from hiprune_vllm.pruning.neighbours import buffer_mask, offsets
from hiprune_vllm.pruning.select import (
    Region,
    attention_indices,
    hiprune_indices,
    kept_indices,
    random_scores,
    stride_indices,
)
from tests.reference import paper

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def problems(draw):
    """A batch of images of one grid, scores with many ties, and a budget for them."""
    rows, columns = draw(grids)
    count = rows * columns
    batch = draw(st.integers(1, 3))
    values = st.lists(st.integers(0, 4), min_size=count, max_size=count)
    made = [[draw(values) for _ in range(batch)] for _ in range(2)]
    return {
        "columns": columns,
        "object_scores": torch.tensor(made[0], dtype=torch.float32),
        "output_scores": torch.tensor(made[1], dtype=torch.float32),
        "keep": draw(st.integers(1, count)),
        "alpha": draw(st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1))),
        "buffer": draw(st.sampled_from(BUFFERS)),
    }


def run(problem):
    arguments = dict(problem)
    alpha = arguments.pop("alpha")
    anchors = anchor_count(problem["keep"], alpha, problem["buffer"])
    return hiprune_indices(**arguments, anchors=anchors)


@settings(max_examples=400, deadline=None)
@given(problems())
def test_selection_equals_the_paper_index_for_index(problem):
    kept = run(problem)
    for image in range(kept.shape[0]):
        assert kept[image].tolist() == paper.select(
            problem["object_scores"][image].tolist(),
            problem["output_scores"][image].tolist(),
            keep=problem["keep"],
            alpha=problem["alpha"],
            columns=problem["columns"],
            buffer=problem["buffer"],
        )


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from(METHODS), st.integers(0, 2**63 - 1))
def test_every_method_keeps_exactly_the_budget_in_ascending_order(problem, method, seed):
    batch, count = problem["output_scores"].shape
    budget = ImageBudget.of(
        count,
        problem["keep"],
        method=method,
        alpha=problem["alpha"],
        buffer=problem["buffer"],
        object_layer=1,
        score="global",
        seed=seed,
    )
    before = problem["object_scores"].clone(), problem["output_scores"].clone()
    kept = kept_indices(
        budget,
        count=count,
        columns=problem["columns"],
        batch=batch,
        device=torch.device("cpu"),
        object_scores=problem["object_scores"],
        output_scores=problem["output_scores"],
    )
    assert kept.shape == (batch, problem["keep"])
    assert kept.dtype == torch.int64
    for row in kept.tolist():
        assert row == sorted(set(row))
        assert row[0] >= 0
        assert row[-1] < count
    assert torch.equal(problem["object_scores"], before[0])
    assert torch.equal(problem["output_scores"], before[1])


@settings(max_examples=100, deadline=None)
@given(problems())
def test_a_full_budget_keeps_every_token(problem):
    problem["keep"] = problem["output_scores"].shape[1]
    assert torch.equal(run(problem)[0], torch.arange(problem["keep"]))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_nothing_outside_the_region_is_kept(problem, method, data):
    batch, count = problem["output_scores"].shape
    columns = problem["columns"]
    rows = count // columns
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom = data.draw(st.integers(top + 1, rows))
    right = data.draw(st.integers(left + 1, columns))
    region = Region(top, bottom, left, right)
    inside = [
        i for i in range(count) if top <= i // columns < bottom and left <= i % columns < right
    ]
    assert region.size == len(inside)
    keep = data.draw(st.integers(1, len(inside)))
    budget = ImageBudget.of(
        len(inside),
        keep,
        method=method,
        alpha=problem["alpha"],
        buffer=problem["buffer"],
        object_layer=1,
        score="global",
        seed=7,
    )
    kept = kept_indices(
        budget,
        count=count,
        columns=columns,
        batch=batch,
        device=torch.device("cpu"),
        object_scores=problem["object_scores"],
        output_scores=problem["output_scores"],
        region=region,
    )
    for image, row in enumerate(kept.tolist()):
        assert len(row) == keep
        assert row == sorted(set(row))
        assert set(row) <= set(inside)
        if budget.needs_attention:
            assert row == paper.select(
                problem["object_scores"][image].tolist(),
                problem["output_scores"][image].tolist(),
                keep=keep,
                alpha=problem["alpha"] if method == "hiprune" else 0.0,
                columns=columns,
                buffer=problem["buffer"],
                allowed=inside,
            )


def test_ties_break_by_lower_index():
    flat = torch.zeros(1, 12)
    kept = hiprune_indices(flat, flat, keep=5, anchors=1, columns=4, buffer="none")
    assert kept.tolist() == [[0, 1, 2, 3, 4]]


def test_nan_scores_still_keep_exactly_the_budget():
    nan = torch.full((1, 12), float("nan"))
    kept = hiprune_indices(nan, nan, keep=5, anchors=1, columns=4, buffer="cross")
    assert len(set(kept[0].tolist())) == 5


def test_a_worked_example():
    """4 x 5 grid, best object token in the middle: anchor 7, cross 2 6 8 12, registers 0 19."""
    objects, outputs = torch.zeros(1, 20), torch.zeros(1, 20)
    objects[0, 7] = 5
    outputs[0, [0, 19, 7]] = torch.tensor([3.0, 2.0, 9.0])
    kept = hiprune_indices(objects, outputs, keep=7, anchors=1, columns=5, buffer="cross")
    assert kept.tolist() == [[0, 2, 6, 7, 8, 12, 19]]


def test_buffers_beyond_the_budget_go_by_object_score():
    objects, outputs = torch.zeros(1, 20), torch.ones(1, 20)
    objects[0, [7, 6, 12, 2]] = torch.tensor([9.0, 3.0, 2.0, 1.0])
    kept = hiprune_indices(objects, outputs, keep=3, anchors=1, columns=5, buffer="cross")
    assert kept.tolist() == [[6, 7, 12]]


@pytest.mark.parametrize("scheme", BUFFERS)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("columns", [1, 2, 7])
def test_neighbours_are_those_of_equation_5(scheme, rows, columns):
    count = rows * columns
    for anchor in range(count):
        mask = torch.zeros(1, count, dtype=torch.bool)
        mask[0, anchor] = True
        found = buffer_mask(mask, columns, scheme)[0].nonzero().flatten().tolist()
        expected = set(paper.neighbours(anchor, columns, count, scheme)) - {anchor}
        assert found == sorted(expected)


def test_the_right_neighbour_of_a_row_end_is_the_next_rows_start():
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, 2] = True
    assert buffer_mask(mask, 3, "row")[0].tolist() == [False, True, False, True, False, False]


def test_unknown_buffer_schemes_are_refused():
    with pytest.raises(ValueError, match="buffer must be one of none, row, cross, square"):
        offsets("diagonal", 3)


def test_random_is_the_same_for_a_seed_and_differs_between_seeds():
    device = torch.device("cpu")
    draws = [random_scores(576, seed=seed, device=device) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_random_draws_every_token_equally_often():
    counts = torch.zeros(20)
    for seed in range(2000):
        drawn = random_scores(20, seed=seed, device=torch.device("cpu"))
        counts[attention_indices(drawn, keep=5)[0]] += 1
    assert (counts - 500).abs().max() < 100  # five standard deviations of 19.4


def test_stride_is_even():
    device = torch.device("cpu")
    assert stride_indices(10, keep=5, device=device).tolist() == [0, 2, 4, 6, 8]
    assert stride_indices(10, keep=4, device=device).tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize("method", ["hiprune", "attention"])
def test_a_missing_score_is_an_error(method):
    budget = ImageBudget.of(
        20, 15, method=method, alpha=1.0, buffer="none", object_layer=1, score="global"
    )
    arguments = {"count": 20, "columns": 5, "batch": 1, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match="needs output_scores"):
        kept_indices(budget, **arguments)
    if method == "hiprune":
        with pytest.raises(ValueError, match="needs object_scores"):
            kept_indices(budget, **arguments, output_scores=torch.zeros(1, 20))


def test_selection_never_reads_a_tensor_on_the_host():
    """On the meta device there are no values: any read of one would raise."""
    scores = torch.empty(3, 576, device="meta")
    for buffer in BUFFERS:
        kept = hiprune_indices(scores, scores, keep=192, anchors=4, columns=24, buffer=buffer)
        assert kept.shape == (3, 192)
    budget = ImageBudget.of(
        576, 64, method="attention", alpha=0.1, buffer="cross", object_layer=1, score="global"
    )
    kept = kept_indices(
        budget, count=576, columns=24, batch=3, device=scores.device, output_scores=scores
    )
    assert kept.shape == (3, 64)
