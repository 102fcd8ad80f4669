import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiprune_vllm.plan import (
    FULL,
    KNOBS,
    MAX_TOKENS,
    SIZES,
    About,
    Encoder,
    Limits,
    PicturesLeftOut,
    PlanError,
    PruningPlan,
    TokenCount,
    complete,
    resolve_all,
    with_seed,
)
from hiprune_vllm.reading import parse_plan, schema

CLIP = Encoder(family="llava", output_layer=23, object_layer=9, has_cls=True)
FREE = dataclasses.replace(CLIP, free_sizes=True, tiles=(2, 4))
SIGLIP = dataclasses.replace(CLIP, has_cls=False)

GOOD = [
    {},
    {"tokens": 1},
    {"tokens": MAX_TOKENS},
    {"ratio": 1},
    {"ratio": 0.001},
    {"alpha": 0},
    {"alpha": 1.0},
    {"object_layer": 1},
    {"object_layer": 22},
    {"buffer": "none"},
    {"score": "cls"},
    {"method": "stride", "tokens": 5},
]


@pytest.mark.parametrize("value", GOOD)
def test_valid_plans_are_read_as_they_are(value):
    assert parse_plan(value, CLIP).to_dict() == value


BAD = [
    (None, "hiprune", "must be an object, got null"),
    ([], "hiprune", "must be an object, got an array"),
    ("x", "hiprune", "must be an object, got 'x'"),
    (3, "hiprune", "must be an object, got 3"),
    (True, "hiprune", "must be an object, got true"),
    ({"token": 5}, "hiprune.token", "is unknown; allowed are tokens, ratio"),
    ({"tokens": 0}, "hiprune.tokens", "must be an integer in [1, 2147483647], got 0"),
    ({"tokens": -1}, "hiprune.tokens", "got -1"),
    ({"tokens": 1.0}, "hiprune.tokens", "got 1.0"),
    ({"tokens": "192"}, "hiprune.tokens", "got '192'"),
    ({"tokens": True}, "hiprune.tokens", "got true"),
    ({"tokens": None}, "hiprune.tokens", "got null"),
    ({"tokens": 2**31}, "hiprune.tokens", "got 2147483648"),
    ({"tokens": 10**5000}, "hiprune.tokens", "got an integer of more than 60 digits"),
    ({"tokens": {}}, "hiprune.tokens", "got an object"),
    ({"ratio": 0}, "hiprune.ratio", "must be a number in (0, 1], got 0"),
    ({"ratio": -0.0}, "hiprune.ratio", "got -0.0"),
    ({"ratio": 1.5}, "hiprune.ratio", "got 1.5"),
    ({"ratio": float("nan")}, "hiprune.ratio", "got nan"),
    ({"ratio": float("inf")}, "hiprune.ratio", "got inf"),
    ({"ratio": 10**400}, "hiprune.ratio", "got an integer of more than 60 digits"),
    ({"ratio": "0.5"}, "hiprune.ratio", "got '0.5'"),
    ({"ratio": False}, "hiprune.ratio", "got false"),
    ({"tokens": 5, "ratio": 0.5}, "hiprune", "must not have both tokens and ratio"),
    ({"alpha": -0.1}, "hiprune.alpha", "must be a number in [0, 1], got -0.1"),
    ({"alpha": 1.01}, "hiprune.alpha", "got 1.01"),
    ({"object_layer": 0}, "hiprune.object_layer", "must be an integer in [1, 22], got 0"),
    ({"object_layer": 23}, "hiprune.object_layer", "got 23"),
    ({"object_layer": 9.0}, "hiprune.object_layer", "got 9.0"),
    ({"object_layer": "9"}, "hiprune.object_layer", "got '9'"),
    ({"buffer": "plus"}, "hiprune.buffer", "must be one of none, row, cross, square, got 'plus'"),
    ({"buffer": ["row"]}, "hiprune.buffer", "got an array"),
    ({"score": "local"}, "hiprune.score", "must be one of global, cls, got 'local'"),
    ({"method": "HiPrune"}, "hiprune.method", "must be one of hiprune, attention, random, stride"),
    ({"x" * 500: 1}, "hiprune." + "x" * 77 + "...", "is unknown"),
]


@pytest.mark.parametrize(("value", "field", "message"), BAD)
def test_invalid_plans_are_refused_with_field_expectation_and_value(value, field, message):
    with pytest.raises(PlanError) as error:
        parse_plan(value, CLIP)
    assert error.value.field == field
    assert message in str(error.value)
    assert str(error.value).startswith(field)
    assert len(str(error.value)) < 300


def test_cls_scores_need_an_encoder_with_a_cls_token():
    with pytest.raises(PlanError, match="no CLS token") as error:
        parse_plan({"score": "cls"}, SIGLIP)
    assert error.value.field == "hiprune.score"


def test_what_a_plan_leaves_open_the_next_in_precedence_decides():
    base = PruningPlan(tokens=192, alpha=0.3, buffer="row")
    assert PruningPlan().over(base) == base
    assert PruningPlan(alpha=0.0).over(base) == PruningPlan(tokens=192, alpha=0.0, buffer="row")
    assert PruningPlan(ratio=0.5).over(base) == PruningPlan(ratio=0.5, alpha=0.3, buffer="row")


def test_both_spellings_of_a_budget_resolve_to_the_same_one():
    by_ratio = parse_plan({"ratio": 0.3333}, CLIP).resolve(TokenCount(576, 576), CLIP)
    assert by_ratio == parse_plan({"tokens": 192}, CLIP).resolve(TokenCount(576, 576), CLIP)
    assert by_ratio.object_layer == 9
    assert by_ratio.anchors == 4


def test_the_full_plan_prunes_nothing():
    assert FULL.resolve(TokenCount(576, 576), CLIP).is_full
    assert PruningPlan().resolve(TokenCount(576, 576), CLIP).is_full


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(list(KNOBS)) | st.text()


@given(values | st.dictionaries(keys, values, max_size=4))
def test_whatever_comes_is_either_served_exactly_or_refused(value):
    try:
        plan = parse_plan(value, CLIP)
    except PlanError:
        return
    assert plan.to_dict() == value
    if plan.total_tokens is None:
        assert 1 <= plan.resolve(TokenCount(576, 576), CLIP).keep <= 576


def test_the_published_schema_agrees_with_the_parser():
    published = schema(FREE)
    assert list(published) == list(KNOBS)
    assert list(schema(CLIP)) == [knob for knob in KNOBS if knob not in (*SIZES, "max_tiles")]
    json.dumps(published)
    for knob, rule in published.items():
        for edge in ("minimum", "maximum"):
            if edge in rule:
                parse_plan({knob: rule[edge]}, FREE)
        if "exclusiveMinimum" in rule:
            with pytest.raises(PlanError):
                parse_plan({knob: rule["exclusiveMinimum"]}, CLIP)
        if "maximum" in rule:
            with pytest.raises(PlanError):
                parse_plan({knob: rule["maximum"] + 1}, CLIP)
        for name in rule.get("enum", ()):
            parse_plan({knob: name}, CLIP)
    assert schema(SIGLIP)["score"]["enum"] == ["global"]
    assert complete(PruningPlan(), CLIP).to_dict() == {
        "ratio": 1.0,
        "alpha": 0.1,
        "object_layer": 9,
        "buffer": "cross",
        "score": "global",
        "method": "hiprune",
    }


def kept(plans, counts):
    return [budget.keep for budget in resolve_all(plans, counts, CLIP)]


def test_total_tokens_are_shared_in_proportion_to_the_full_size():
    large, small = TokenCount(2880, 2844), TokenCount(576, 576)
    total = PruningPlan(total_tokens=300)
    assert kept([total, total], [large, small]) == [250, 50]
    assert kept([total, PruningPlan(tokens=7), total], [small, large, small]) == [150, 7, 150]
    assert kept([PruningPlan(total_tokens=3)] * 3, [large, small, small]) == [1, 1, 1]
    assert kept([PruningPlan(total_tokens=10**6)] * 2, [small, small]) == [576, 576]
    with pytest.raises(PlanError, match=r"one number for the whole request, got \[5, 6\]"):
        kept([PruningPlan(total_tokens=5), PruningPlan(total_tokens=6)], [small, small])
    with pytest.raises(PlanError, match="at least 1 for each of 2 images, got 1") as error:
        kept([PruningPlan(total_tokens=1)] * 2, [small, small])
    assert error.value.field == "hiprune.total_tokens"


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.data())
def test_total_tokens_add_up(sizes, data):
    total = data.draw(st.integers(len(sizes), sum(sizes) + 10))
    shares = kept([PruningPlan(total_tokens=total)] * len(sizes), [TokenCount(s, s) for s in sizes])
    assert sum(shares) == min(total, sum(sizes))
    assert min(shares) >= 1


def test_one_image_has_no_total():
    with pytest.raises(PlanError, match="is unknown") as error:
        parse_plan({"total_tokens": 5}, CLIP, for_one_image=True)
    assert error.value.field == "hiprune.total_tokens"
    with pytest.raises(PlanError, match="both ratio and total_tokens"):
        parse_plan({"total_tokens": 5, "ratio": 0.5}, CLIP)


def test_a_pruned_image_has_no_tokens_of_the_models_own():
    """LLaVA-NeXT: 100 tokens of which 90 show the picture and 10 are newlines."""
    count = TokenCount(100, 90)
    assert PruningPlan(tokens=50).resolve(count, CLIP).keep == 50
    assert PruningPlan(tokens=95).resolve(count, CLIP).keep == 90
    assert PruningPlan(tokens=100).resolve(count, CLIP).is_full


LIMITS = Limits(min_tokens=16, max_tokens=192, methods=("hiprune",), fixed=("alpha",))


@pytest.mark.parametrize(
    ("wish", "field", "message"),
    [
        ({"tokens": 15}, "hiprune.tokens", "at least 16 (limits.min_tokens)"),
        ({"tokens": 193}, "hiprune.tokens", "at most 192 (limits.max_tokens)"),
        ({"alpha": 0.1}, "hiprune.alpha", "set by the operator (limits.fixed)"),
        ({"method": "random"}, "hiprune.method", "must be one of hiprune (limits.methods)"),
    ],
)
def test_a_wish_outside_the_limits_is_told(wish, field, message):
    with pytest.raises(PlanError) as error:
        LIMITS.check(parse_plan(wish, CLIP))
    assert error.value.field == field
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        (PruningPlan(ratio=0.01), "hiprune.ratio"),
        (PruningPlan(ratio=1.0), "hiprune.ratio"),
        (PruningPlan(total_tokens=20), "hiprune.total_tokens"),
    ],
)
def test_a_share_outside_the_limits_is_told_once_the_image_is_known(plan, field):
    with pytest.raises(PlanError, match="of an image's 576 tokens") as error:
        resolve_all([plan] * 2, [TokenCount(576, 576)] * 2, CLIP, LIMITS)
    assert error.value.field == field


@given(st.integers(1, 3000), st.integers(1, 400), st.integers(0, 400))
def test_the_operators_own_plans_are_held_within_the_limits(full, low, more):
    limits = Limits(min_tokens=low, max_tokens=low + more)
    count = TokenCount(full, full)
    for own in (PruningPlan(ratio=1.0), PruningPlan(ratio=0.01), PruningPlan(tokens=200)):
        plan = PruningPlan(alpha=0.2).over(dataclasses.replace(own, of_operator=True))
        (budget,) = resolve_all([plan], [count], CLIP, limits)
        assert min(low, full) <= budget.keep <= min(low + more, full)


def test_an_image_smaller_than_the_limit_keeps_all():
    (budget,) = resolve_all([PruningPlan(tokens=16)], [TokenCount(9, 9)], CLIP, LIMITS)
    assert budget.is_full


def test_a_budget_is_its_owners():
    preset = PruningPlan(tokens=64, of_operator=True)
    assert PruningPlan(alpha=0.5).over(preset).of_operator
    assert not PruningPlan(ratio=0.5).over(preset).of_operator
    assert PruningPlan(ratio=0.5).over(preset).tokens is None


@pytest.mark.parametrize(
    ("mine", "theirs", "merged"),
    [
        ({"max_pixels": 50}, {"min_pixels": 10}, (10, 50)),
        ({"max_pixels": 50}, {"min_pixels": 60}, (50, 50)),  # mine decides
        ({"min_pixels": 60}, {"max_pixels": 50}, (60, 60)),
        ({"min_pixels": 20}, {"min_pixels": 60, "max_pixels": 70}, (20, 70)),
        ({}, {"min_pixels": 60, "max_pixels": 70}, (60, 70)),
    ],
)
def test_sizes_of_two_wishes_fit_together(mine, theirs, merged):
    plan = PruningPlan(**mine).over(PruningPlan(**theirs))
    assert (plan.min_pixels, plan.max_pixels) == merged
    assert not plan.keeps_all


def test_what_a_requests_images_are_before_pruning_is_limited():
    limits = Limits(max_full_tokens=2000)
    limits.check_images([576] * 3)
    limits.check_images([2000])
    limits.check_images([])
    with pytest.raises(PlanError) as error:
        limits.check_images([576] * 4)
    told = str(error.value)
    assert "at most 2000 visual tokens" in told
    assert "limits.max_full_tokens" in told
    assert "got 2304 in 4 images" in told


def test_the_limit_lets_through_what_people_ask_for():
    usual = Limits()
    usual.check_images([16384] * 64)  # the largest that Qwen2.5-VL takes
    usual.check_images([2880] * 300)
    usual.check_images([576] * 999)  # vLLM's own limit of pictures
    with pytest.raises(PlanError):
        usual.check_images([16384] * 65)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "9", None])
@pytest.mark.parametrize("name", ["min_tokens", "max_tokens", "max_full_tokens", "max_pixels"])
def test_limits_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(PlanError, match=rf"hiprune_limits\.{name} must be an integer >= 1"):
        Limits(**{name: value})


def test_least_pixels_are_not_above_most():
    with pytest.raises(PlanError, match="must be at most max_pixels 5, got 9") as error:
        parse_plan({"min_pixels": 9, "max_pixels": 5}, FREE)
    assert error.value.field == "hiprune.min_pixels"
    assert parse_plan({"min_pixels": 5, "max_pixels": 5}, FREE).max_pixels == 5


@pytest.mark.parametrize("knob", SIZES)
def test_a_size_above_the_operators_is_told(knob):
    limits = Limits(max_pixels=100)
    limits.check(PruningPlan(**{knob: 100}))
    with pytest.raises(PlanError, match=r"at most 100 \(limits.max_pixels\), got 101"):
        limits.check(PruningPlan(**{knob: 101}))


def test_where_nothing_is_published_the_advice_says_so():
    assert About("a patch", "9").advice.startswith("Nothing is published")
    told = About("a patch", "9", published="99 %").to_dict()
    assert told["advice"].startswith("Measure on your own")
    assert list(told) == ["token", "layer", "dropped", "published", "advice"]


def test_pictures_left_out_are_a_fault_of_the_field_and_say_what_marks_a_place():
    error = PicturesLeftOut("messages", "must have room", [5])
    assert (error.field, error.placeholder, str(error)) == (
        "messages",
        [5],
        "messages must have room",
    )


def test_only_a_random_budget_has_a_seed():
    count = TokenCount(576, 576)
    drawn = parse_plan({"tokens": 5, "method": "random"}, CLIP).resolve(count, CLIP)
    chosen = parse_plan({"tokens": 5}, CLIP).resolve(count, CLIP)
    assert with_seed(drawn, 7).seed == 7
    assert with_seed(chosen, 7) == chosen
