import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiprune_vllm.pruning.budget import BUFFERS, METHODS, ImageBudget, anchor_count, tokens_kept


@pytest.mark.parametrize(
    ("keep", "alpha", "buffer", "anchors"),
    [
        (192, 0.1, "cross", 4),  # 3.84
        (128, 0.1, "cross", 3),  # 2.56
        (64, 0.1, "cross", 1),  # 1.28
        (25, 0.1, "cross", 0),  # 0.5: half to even, a ceiling would give 1
        (75, 0.1, "cross", 2),  # 1.5: half to even
        (1, 1.0, "cross", 0),
        (1, 1.0, "none", 1),
        (192, 0.1, "none", 19),
        (192, 0.1, "row", 6),
        (192, 0.1, "square", 2),
        (576, 1.0, "cross", 115),
        (100, 0.0, "none", 0),
    ],
)
def test_anchor_count_rounds_as_algorithm_1_does(keep, alpha, buffer, anchors):
    assert anchor_count(keep, alpha, buffer) == anchors


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from(BUFFERS))
def test_anchors_never_exceed_the_budget(keep, alpha, buffer):
    assert 0 <= anchor_count(keep, alpha, buffer) <= keep


@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        ({}, 576),
        ({"tokens": 192}, 192),
        ({"tokens": 577}, 576),
        ({"ratio": 0.3333}, 192),
        ({"ratio": 1 / 9}, 64),
        ({"ratio": 0.0001}, 1),
        ({"ratio": 1.0}, 576),
    ],
)
def test_tokens_kept(wish, kept):
    assert tokens_kept(576, **wish) == kept


def budget(full=576, keep=64, **knobs):
    standard = {
        "method": "hiprune",
        "alpha": 0.1,
        "buffer": "cross",
        "object_layer": 9,
        "score": "global",
    }
    return ImageBudget.of(full, keep, **(standard | knobs))


def test_a_budget_that_keeps_everything_is_the_same_whatever_else_was_asked():
    assert budget(keep=576) == budget(keep=600, method="random", seed=3, buffer="row")
    assert budget(keep=576).is_full


def test_knobs_that_change_nothing_do_not_change_the_budget():
    assert budget(alpha=0.0) == budget(method="attention", buffer="row", object_layer=3)
    assert budget(method="stride", score="cls") == budget(method="stride")
    assert budget(seed=5) == budget(seed=6)
    assert budget(alpha=0.1) == budget(alpha=0.11)  # one anchor either way


def test_knobs_that_change_the_tokens_change_the_budget():
    different = [
        budget(),
        budget(keep=65),
        budget(object_layer=8),
        budget(buffer="row"),
        budget(score="cls"),
        budget(alpha=0.5),
        budget(method="attention"),
        budget(method="attention", score="cls"),
        budget(method="random", seed=1),
        budget(method="random", seed=2),
        budget(method="stride"),
    ]
    assert len(set(different)) == len(different)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from(METHODS),
    st.floats(0, 1),
    st.sampled_from(BUFFERS),
    st.integers(1, 40),
    st.sampled_from(["global", "cls"]),
    st.integers(0, 2**63 - 1),
)
def test_a_budget_survives_the_trip_to_the_worker(
    full, keep, method, alpha, buffer, layer, score, seed
):
    sent = ImageBudget.of(
        full,
        keep,
        method=method,
        alpha=alpha,
        buffer=buffer,
        object_layer=layer,
        score=score,
        seed=seed,
    )
    row = sent.to_ints()
    assert ImageBudget.from_ints(row) == sent
    assert all(0 <= value < 2**63 for value in row)
    assert sent.keep == min(keep, full)
