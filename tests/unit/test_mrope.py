"""What the worker tells vLLM's runner about 3-D positions, without an engine."""

import inspect
from types import MethodType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from hiprune_vllm.engine.compat import leave_positions_of_text
from hiprune_vllm.engine.positions import PrunedMRopeModel
from hiprune_vllm.pruning.positions import encode_positions, no_positions

WIDTH, IMAGE, VIDEO = 8, 7, 8


def a_model():
    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)
    model = SimpleNamespace(visual=SimpleNamespace(out_hidden_size=WIDTH), config=config)
    for name in ("get_mrope_input_positions", "recompute_mrope_positions"):
        setattr(model, name, MethodType(getattr(PrunedMRopeModel, name), model))
    return model


grids = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
items = st.tuples(st.integers(0, 4), grids, st.booleans(), st.sampled_from([1.0, 2.5, 0.4]))


@given(st.lists(items, max_size=5), st.integers(1, 6), st.data())
def test_decoding_goes_on_behind_every_position_of_the_prompt(parts, text, data):
    """Whichever chunks bring embeddings: the last token of a prompt has its latest position."""
    ids, features, walked, embeddings = [], [], [], []
    for before, (frames, h, w), pruned, speed in parts:
        ids += [1] * before
        t, factor = (1, 1.0) if pruned else (frames, speed)
        length = data.draw(st.integers(1, h * w)) if pruned else t * h * w
        features.append(
            SimpleNamespace(
                mm_position=PlaceholderRange(offset=len(ids), length=length), pruned=pruned
            )
        )
        walked.append((len(ids), t, h, w, factor))
        embedding = torch.zeros(length, WIDTH)
        kept = torch.tensor(
            data.draw(
                st.lists(st.integers(0, h * w - 1), min_size=length, max_size=length, unique=True)
            )
            if pruned
            else []
        )
        columns = (
            encode_positions(kept, w, torch.float32) if pruned else no_positions(length, embedding)
        )
        embeddings.append(torch.cat([embedding, columns], dim=1))
        ids += [IMAGE] * length
    if data.draw(st.booleans()) or any(feature.pruned for feature in features[-1:]):
        ids += [1] * text  # text must follow a pruned image
    if not ids:
        return
    model = a_model()
    model.iter_mm_grid_thw = lambda _: walked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hiprune_vllm.engine.positions._is_pruned", lambda feature: feature.pruned)
        positions, delta = model.get_mrope_input_positions(ids, features)
    assert delta == int(positions.max()) + 1 - len(ids)

    same, whole, again = model.recompute_mrope_positions(ids, [], positions, len(ids))
    assert (same, again) == ([], delta)
    assert whole is positions  # nothing is copied

    _, written, after = model.recompute_mrope_positions(ids, embeddings, positions, 0)
    assert after == delta == int(written.max()) + 1 - len(ids)


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
        _get_encoder_output_from_cache=lambda _: torch.zeros(10, WIDTH + 5),
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
        (29, 5, True, 1, False),  # a draft model's view
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
    leave_positions_of_text()
    gather = GPUModelRunner._gather_mm_embeddings
    leave_positions_of_text()
    assert GPUModelRunner._gather_mm_embeddings is gather is not stock  # once
    place = PlaceholderRange(offset=20, length=10)
    image = SimpleNamespace(mm_position=place, identifier="x", modality="image")
    asked, runner = a_runner(computed=computed, features=[image] if has_image else [])
    out = SimpleNamespace(
        total_num_scheduled_tokens=scheduled, num_scheduled_tokens={"one": scheduled}
    )
    gather(runner, out, shift_computed_tokens=shift)
    assert asked == ([computed] if asks else [])
    assert runner.is_multimodal_pruning_enabled
