import pytest
import torch
from torch import nn

from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.record import ScoreRecorder, Wanted, wanted_scores
from tests.reference import paper

HEADS, WIDTH, TOKENS = 4, 8, 10


class Attention(nn.Module):
    """Called like vLLM's encoder attention: flattened heads, or one axis for them."""

    num_heads, head_size, scale = HEADS, WIDTH, WIDTH**-0.5

    def forward(self, query, key, value):
        return value


def tensors(batch=3, flat=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, TOKENS, HEADS * WIDTH) if flat else (batch, TOKENS, HEADS, WIDTH)
    return [torch.randn(shape, generator=generator) * 2 for _ in range(3)]


def expected(query, key, row, cls_only=False):
    q, k = (x[row].view(TOKENS, HEADS, WIDTH).transpose(0, 1) for x in (query, key))
    full = paper.attention(q, k)
    return torch.tensor(paper.scores(full, has_cls=True, cls_only=cls_only))


def recorder(layers, **options):
    return ScoreRecorder(layers, heads=HEADS, leading_tokens=1, **options)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("rows", [(0, 1, 2), (2,), (0, 2)])
@pytest.mark.parametrize("score", ["global", "cls"])
def test_scores_of_the_wanted_rows_and_layers_are_recorded(flat, rows, score):
    layers = [Attention(), Attention()]
    query, key, value = tensors(flat=flat)
    with recorder(layers).recording([Wanted(2, score, rows)]) as scores:
        layers[0](key, query, value)
        result = layers[1](query, key, value)
    assert result is value
    assert set(scores) == {(2, score, row) for row in rows}
    for row in rows:
        torch.testing.assert_close(
            scores[2, score, row], expected(query, key, row, score == "cls"), rtol=1e-5, atol=1e-6
        )


def test_arguments_may_come_by_keyword():
    layer = Attention()
    query, key, value = tensors()
    with recorder([layer]).recording([Wanted(1, "global", (0,))]) as scores:
        layer(query=query, key=key, value=value)
    torch.testing.assert_close(scores[1, "global", 0], expected(query, key, 0))


def test_nothing_is_left_behind_also_after_an_error():
    layer = Attention()
    with (
        pytest.raises(RuntimeError, match="boom"),
        recorder([layer]).recording([Wanted(1, "global", (0,))]),
    ):
        raise RuntimeError("boom")
    assert not layer._forward_pre_hooks


def test_per_rank_sums_are_added_before_the_mean_over_heads():
    """Two ranks with half the heads each give the scores of one rank with all."""
    query, key, value = tensors()
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        layer = Attention()
        layer.num_heads = 2
        q, k = (x.view(3, TOKENS, HEADS, WIDTH)[:, :, half] for x in (query, key))

        def keep(partial):
            parts.append(partial)
            return partial

        with recorder([layer], sum_over_ranks=keep).recording([Wanted(1, "global", (0, 1, 2))]):
            layer(q, k, value)

    def total(_partial):
        return parts[0] + parts[1]

    layer = Attention()
    layer.num_heads = 2
    with recorder([layer], sum_over_ranks=total).recording(
        [Wanted(1, "global", (0, 1, 2))]
    ) as scores:
        layer(q, k, value)
    for row in range(3):
        torch.testing.assert_close(
            scores[1, "global", row], expected(query, key, row), rtol=1e-5, atol=1e-6
        )


def test_ranks_that_hold_all_heads_add_nothing_up():
    """Where heads do not split over the ranks, as 25 over two."""
    layer = Attention()
    query, key, value = tensors()
    with recorder([layer], sum_over_ranks=lambda part: 2 * part).recording(
        [Wanted(1, "global", (0,))]
    ) as scores:
        layer(query, key, value)
    torch.testing.assert_close(
        scores[1, "global", 0], expected(query, key, 0), rtol=1e-5, atol=1e-6
    )


def budget(method="hiprune", layer=3, score="global", keep=64):
    return ImageBudget.of(
        576, keep, method=method, alpha=0.1, buffer="cross", object_layer=layer, score=score
    )


def test_only_the_layers_that_a_batch_needs_are_wanted():
    batch = [
        budget(),
        budget(keep=576),
        budget(method="random"),
        budget(method="stride"),
        budget(layer=4),
        budget(method="attention"),
        budget(score="cls"),
    ]
    assert set(wanted_scores(dict(enumerate(batch)), output_layer=8)) == {
        Wanted(8, "global", (0, 4, 5)),
        Wanted(3, "global", (0,)),
        Wanted(4, "global", (4,)),
        Wanted(8, "cls", (6,)),
        Wanted(3, "cls", (6,)),
    }
    assert wanted_scores(dict(enumerate(batch[1:4])), output_layer=8) == []


def test_a_traced_row_has_scores_of_both_layers_whatever_its_budget():
    traced = {0: (3, "global"), 1: (4, "cls")}
    found = wanted_scores({0: budget(keep=576)}, output_layer=8, traced=traced)
    assert set(found) == {
        Wanted(3, "global", (0,)),
        Wanted(8, "global", (0,)),
        Wanted(4, "cls", (1,)),
        Wanted(8, "cls", (1,)),
    }


def test_images_in_one_row_attend_to_themselves_alone():
    layer = Attention()
    query, key, value = tensors(batch=1, flat=False)
    spans = [(0, 4), (4, TOKENS)]
    of_spans = ScoreRecorder([layer], heads=HEADS, leading_tokens=0, spans=spans)
    with of_spans.recording([Wanted(1, "global", (0, 1))]) as scores:
        layer(query, key, value)
    for row, (start, stop) in enumerate(spans):
        q, k = (x[0, start:stop].transpose(0, 1) for x in (query, key))
        alone = torch.tensor(paper.scores(paper.attention(q, k), has_cls=False))
        torch.testing.assert_close(scores[1, "global", row], alone, rtol=1e-5, atol=1e-6)
