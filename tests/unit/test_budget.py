import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiprune_vllm.pruning.budget import (
    BUFFERS,
    METHODS,
    ImageBudget,
    anchor_count,
    spread,
    spread_evenly,
    tokens_kept,
)


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
    assert budget(keep=20) == budget(keep=20, method="attention")  # 20 tokens have no anchor


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


places = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=7)


@given(places, st.data())
def test_spread_adds_up_within_the_caps_and_is_fair(pairs, data):
    weights, caps = [w for w, _ in pairs], [c for _, c in pairs]
    room = sum(cap for weight, cap in pairs if weight)
    total = data.draw(st.integers(0, room))
    shares = spread(total, weights, caps)
    assert sum(shares) == total
    for share, (weight, cap) in zip(shares, pairs, strict=True):
        assert 0 <= share <= cap
        assert weight or not share
    # Fair: whoever is not full has at least its weight's worth, to one token.
    for i, (weight, cap) in enumerate(pairs):
        for j, (other, _) in enumerate(pairs):
            if weight and other and shares[i] < cap:
                assert (shares[i] + 1) * other >= (shares[j] - 1) * weight


def test_spread_by_example():
    assert spread(320, [1] * 5, [576] * 5) == [64] * 5
    assert spread(322, [1] * 5, [576] * 5) == [65, 65, 64, 64, 64]
    assert spread(100, [1, 1, 1], [576, 10, 576]) == [45, 10, 45]
    assert spread(10, [576, 288], [576, 288]) == [7, 3]
    assert spread(5, [1, 1], [2, 3]) == [2, 3]
    assert spread(0, [1, 2], [5, 5]) == [0, 0]
    with pytest.raises(ValueError, match="does not fit"):
        spread(6, [1, 1], [2, 3])


def test_a_part_keeps_the_knobs_and_draws_for_itself():
    whole = budget(full=2880, keep=640, alpha=0.5, method="hiprune")
    tile = whole.part(576, 128, 2)
    assert (tile.full, tile.keep, tile.alpha, tile.anchors) == (576, 128, 0.5, 13)
    assert whole.part(576, 576, 0).is_full
    drawn = budget(method="random", seed=2**63 - 1)
    assert {drawn.part(576, 10, i).seed for i in range(3)} == {2**63 - 1, 0, 1}


@given(st.integers(0, 500), st.integers(1, 60))
def test_slices_share_evenly_wherever_one_looks(total, places):
    shares = spread_evenly(total, places)
    assert len(shares) == places
    assert sum(shares) == total
    assert {share - total // places for share in shares} <= {0, 1}
    for start in range(places):
        for stop in range(start + 1, places + 1):
            fair = total * (stop - start) / places
            assert abs(sum(shares[start:stop]) - fair) <= 1


def test_one_token_is_of_the_middle():
    assert spread_evenly(1, 3) == [0, 1, 0]
    assert spread_evenly(2, 5) == [0, 1, 0, 1, 0]
