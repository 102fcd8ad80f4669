"""What the plugin takes for granted about vLLM's newer model runner, which CUDA engines have.

Its parts run here on the CPU, one by one, in a process where Triton's kernels are interpreted. No
engine is started; `tests/e2e/test_newer_runner.py` has a whole one.
"""

import inspect
import random
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from tests.contract.newer_runner import (
    COLUMNS,
    IMAGE,
    LENGTH,
    PARTS,
    REQUESTS,
    TOKENS,
    WIDTH,
    Runner,
    a_config,
    a_model,
    a_prompt,
    embedded,
    pictures,
    pretend,
)
from tests.e2e.offline import INTERPRETED_KERNELS, new_process

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="stands in for CUDA, which is there: see tests/e2e"
)

# Triton counts as usable where devices are hidden, also under a build that is none for the CPU.
ENVIRONMENT = INTERPRETED_KERNELS | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def there():
    """Calls functions where vLLM's newer runner can be imported."""
    with new_process(ENVIRONMENT) as call:
        call(pretend)
        yield call


def source(method):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    return inspect.getsource(getattr(GPUModelRunner, method))


PROMPTS = {
    "text": ([], 9),
    "one": ([(3, 0)], 4),
    "two": ([(0, 2), (2, 3)], 1),
    "many": ([(1, 4), (0, 1), (0, 0), (1, 2), (4, 3)], 5),
    "whole": ([(2, 2)], 3),
}


def served(chunk, seed):
    """What the model sees of every prompt, and what was to be seen."""
    draw = random.Random(seed)
    runner = Runner(dict(enumerate(PARTS)))
    expected, seen, left = {}, {}, {}
    for name, (parts, tail) in PROMPTS.items():
        ids, features, positions = a_prompt(parts, tail)
        runner.add(name, ids, features)
        expected[name] = positions, embedded(ids, features)
        seen[name], left[name] = [], len(ids)
    widths = set()
    while left:
        names = draw.sample(sorted(left), len(left))
        scheduled, room = {}, TOKENS
        for name in names:
            count = min(chunk, left[name], room)
            if count:
                scheduled[name], room = count, room - count
        found, draft = runner.step(scheduled)
        widths |= {item.shape[1] for item in draft}
        for name, inputs in found.items():
            seen[name].append(inputs)
            left[name] -= scheduled[name]
            if not left[name]:
                del left[name]
    # Decoding goes on behind the prompt, in one batch with another request's picture.
    ids, features, positions = a_prompt([(2, 0)], 2)
    runner.add("late", ids, features)
    found, _ = runner.step({"one": 1, "late": 4, "many": 1}, {"one": 5, "many": IMAGE})
    decoded = {name: found[name][0].tolist() for name in ("one", "many")}
    together = {
        name: tuple(torch.cat(kind, dim=-1 if kind[0].dtype == torch.int64 else 0)
                    for kind in zip(*steps, strict=True))
        for name, steps in seen.items()
    }  # fmt: skip
    return together, expected, decoded, widths, found["late"], (positions, embedded(ids, features))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_chunks_in_any_order_of_requests_bring_kept_tokens_and_their_own_positions(there, chunk):
    """Otherwise pruned pictures are seen in wrong places, or the width of embeddings is wrong."""
    seen, expected, decoded, widths, late, of_late = there(served, chunk, chunk)
    for name, (positions, rows) in expected.items():
        assert torch.equal(seen[name][0], positions), name
        assert torch.equal(seen[name][1], rows), name
        last = int(positions.max())
        if name in decoded:
            assert decoded[name] == [[last + 1]] * 3
    assert widths == {WIDTH}  # a draft model gets them without positions
    assert torch.equal(late[0], of_late[0][:, :4])
    assert torch.equal(late[1], of_late[1][:4])


def resumed():
    """From inside a picture (a hit in the prefix cache), and once more after a preemption."""
    found = {}
    ids, features, positions = a_prompt(*PROMPTS["many"])
    expected = embedded(ids, features)
    for start in range(len(ids)):
        runner = Runner(dict(enumerate(PARTS)))
        runner.add("hit", ids, features, computed=start)
        found["hit", start] = runner.step({"hit": len(ids) - start})[0]["hit"]
        runner.remove("hit")
        runner.cache.reset_encoder_cache()
        # It had answered with the placeholder of a picture: this is no place for one.
        again, prompt = [*ids, 5, IMAGE, 5], len(ids)
        runner.add("hit", again, features, prompt=prompt, computed=start)
        found["again", start] = runner.step({"hit": len(again) - start})[0]["hit"]
        found["next", start] = runner.step({"hit": 1}, {"hit": 5})[0]["hit"]
    return found, positions, expected


def test_what_is_computed_from_inside_a_picture_has_the_positions_of_the_whole(there):
    """Otherwise a hit in the prefix cache or a preemption moves the rest of a picture."""
    found, positions, rows = there(resumed)
    last = int(positions.max())
    answer = torch.tensor([[last + 1, last + 2, last + 3]] * 3)
    for start in range(positions.shape[1]):
        seen, embeds = found["hit", start]
        assert torch.equal(seen, positions[:, start:])
        assert torch.equal(embeds, rows[start:])
        seen, embeds = found["again", start]
        assert torch.equal(seen, torch.cat([positions[:, start:], answer], dim=1))
        assert torch.equal(embeds[:-3], rows[start:])
        assert embeds[-3:, 0].tolist() == [-5, -IMAGE, -5]
        assert found["next", start][0].tolist() == [[last + 4]] * 3


def asked():
    """Which parts of the newer runner take positions off embeddings, by what is configured."""
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.mm.rope import get_rope_state
    from vllm.v1.worker.gpu.model_states.mm_pruning import maybe_create_mm_pruner

    model = a_model({})

    def pruner(config, served, cache):
        found = config.model_config
        rope = get_rope_state(found, served, REQUESTS, TOKENS, LENGTH, torch.device("cpu"))
        return maybe_create_mm_pruner(found, served, rope, cache) is not None

    flat = a_config()
    flat.model_config.uses_mrope = False
    return {
        "ours": pruner(a_config(), model, EncoderCache()),
        "stock configuration": pruner(a_config(ours=False), model, EncoderCache()),
        "later stage": pruner(a_config(), model, None),
        "one position a token": pruner(flat, model, EncoderCache()),
    }


def test_the_configuration_is_asked_once_the_model_is_loaded_and_on_the_first_stage_only(there):
    """Our model changes the configuration when it is made; asked before, positions stay inside."""
    assert there(asked) == {
        "ours": True,
        "stock configuration": False,
        "later stage": False,
        "one position a token": False,
    }
    loaded = there(source, "load_model")
    assert loaded.index("model_loader.load_model(") < loaded.index("init_model_state(")
    made = there(source, "__init__")
    assert re.search(
        r"if self\.supports_mm_inputs and self\.is_first_pp_rank:\s+"
        r"self\.encoder_cache = EncoderCache\(\)",
        made,
    )


class Request(SimpleNamespace):
    """As much of a request as vLLM's account of encoder outputs asks for."""

    def get_num_encoder_embeds(self, index):
        return self.mm_features[index].mm_position.get_num_embeds()


def encoded():
    """What a step's pictures are to the model, and what stays when the scheduler frees some."""
    from hiprune_vllm.engine.scheduling import WholeImageBudget

    runner, manager = Runner(dict(enumerate(PARTS))), WholeImageBudget(cache_size=12)
    requests = [
        Request(request_id="a", mm_features=pictures((0, 0, *PARTS[0]), (2, 9, *PARTS[2]))),
        Request(request_id="b", mm_features=pictures((0, 1, *PARTS[0]), (1, 8, *PARTS[1]))),
    ]
    wanted = {}
    for request in requests:
        runner.cache.add_request(request.request_id, request.mm_features)
        for i in range(len(request.mm_features)):
            if not manager.check_and_update_cache(request, i):
                assert manager.can_allocate(request, i, 1000, 0)
                manager.allocate(request, i)
                wanted.setdefault(request.request_id, []).append(i)
    runner.state.execute_mm_encoder(wanted)
    (batch,) = runner.model.batches
    shapes = {name: tuple(item.shape) for name, item in runner.cache.encoder_outputs.items()}
    # Nobody needs them any more, and another picture takes the room of some.
    for request in requests:
        manager.free(request)
    assert manager.can_allocate(
        Request(request_id="c", mm_features=pictures((3, 0, *PARTS[3]))), 0, 1000, 0
    )
    freed = manager.get_freed_mm_hashes()
    for name in freed:
        runner.cache.free_encoder_cache(name)
    numbers = batch["pixel_values"].flatten(1)[:, 0].tolist()
    return sorted(batch), numbers, shapes, freed, sorted(runner.cache.encoder_outputs)


def test_pictures_are_encoded_in_one_batch_and_kept_by_the_identity_that_has_their_budget(there):
    """Otherwise a picture meets another one's embeddings, of another length."""
    given, numbers, shapes, freed, left = there(encoded)
    assert given == ["hiprune_budget", "image_grid_thw", "pixel_values"]
    assert numbers == [0, 2, 1]  # what two requests have is encoded once
    lengths = {f"picture {i}": len(PARTS[i][0] or range(6)) for i in (0, 1, 2)}
    assert shapes == {name: (length, WIDTH + COLUMNS) for name, length in lengths.items()}
    assert freed
    assert set(freed) | set(left) == set(lengths)
    assert not set(freed) & set(left)


def mixed():
    """Batches of a step with pictures and videos in turn, and what each comes to."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem

    def video(number):
        field = MultiModalFieldConfig.batched("video")
        (elem,) = field.build_elems("pixel_values_videos", torch.full((1, 4), float(number)))
        return "video", MultiModalKwargsItem({"pixel_values_videos": elem})

    runner = Runner(dict(enumerate(PARTS)))
    (first, second) = (
        ("image", one.data) for one in pictures((1, 0, *PARTS[1]), (0, 2, *PARTS[0]))
    )
    outputs = runner.state.encoder_runner.execute_mm_encoder(
        [video(50), first, video(60), second, video(70)]
    )
    return [sorted(batch) for batch in runner.model.batches], [item[0, 0] for item in outputs]


def test_pictures_and_videos_of_a_step_are_batches_of_their_own_and_keep_their_order(there):
    """Otherwise a picture's rows go to the places of a video."""
    batches, firsts = there(mixed)
    assert batches == [
        ["hiprune_budget", "image_grid_thw", "pixel_values"],
        ["pixel_values_videos"],
    ]
    assert firsts == [50, 1000, 60, 0, 70]


def captured():
    """Pictures that a captured encoder gets, that the model gets, and widths of what comes back."""
    from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager
    from vllm.v1.worker.encoder_cudagraph_defs import EncoderCudaGraphConfig

    from hiprune_vllm.engine.compat import keep_pruned_images_out_of_graphs

    keep_pruned_images_out_of_graphs()
    runner = Runner(dict(enumerate(PARTS)))
    for number, name in ((0, "a"), (2, "b"), (4, "c")):
        runner.cache.add_request(name, pictures((number, 0, *PARTS[number])))
    graphs, in_graphs = object.__new__(EncoderCudaGraphManager), []

    def run_graphs(inputs):
        in_graphs.append(inputs)
        counts = [rows * columns // 4 for _, rows, columns in inputs["image_grid_thw"].tolist()]
        return [torch.zeros(count, WIDTH) for count in counts]

    graphs.config = EncoderCudaGraphConfig(["image", "video"], [], WIDTH)
    graphs.graph_pool, graphs.model, graphs.use_dp = "captured", runner.model, False
    graphs.graph_hits = graphs.graph_misses = 0
    graphs.budget_graphs, graphs.token_budgets = {}, []
    graphs._execute_local = run_graphs
    runner.state.encoder_runner.cudagraph_manager = graphs
    widths = []
    for step in ({"b": [0], "c": [0]}, {"a": [0]}):
        found = runner.state.encoder_runner.execute_mm_encoder(
            runner.state.encoder_runner.prepare_mm_inputs(step)[1]
        )
        widths.append([item.shape[1] for item in found])
    of_graphs = [sorted(inputs) for inputs in in_graphs]
    return of_graphs, [len(batch["image_grid_thw"]) for batch in runner.model.batches], widths


def test_pruned_pictures_go_around_a_captured_encoder_and_others_through_it(there):
    """Otherwise they come back whole, with more rows than they have places."""
    of_graphs, of_model, widths = there(captured)
    assert of_graphs == [["image_grid_thw", "pixel_values"]]  # vLLM's own inputs alone
    assert of_model == [1]
    assert widths == [[WIDTH + COLUMNS] * 2, [WIDTH + COLUMNS]]


def on_resuming():
    """What is known of a request whose first two pictures are in the prefix cache."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request as WholeRequest
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

    ids, features, positions = a_prompt(*PROMPTS["many"])
    request = WholeRequest("a", ids, SamplingParams(max_tokens=9), None, mm_features=features)
    request.num_computed_tokens = features[1].mm_position.offset + 2
    new = NewRequestData.from_request(request, ([1],), [*ids, 5], uses_mrope=True)
    fields = [sorted(one.data) for one in new.mm_features]
    found, delta = a_model({}).get_mrope_input_positions(new.prefill_token_ids, new.mm_features)

    cache, given = EncoderCache(), list(new.mm_features)
    cache.add_request("a", given)
    if hasattr(cache, "update_encoder_inputs"):
        cache.update_encoder_inputs("a", {2: None})  # encoded, and not needed any more
    kept = [one.data is not None for one in request.mm_features]
    return fields, torch.equal(found[:, : len(ids)], a_start(positions, features)), delta, kept


def a_start(positions, features):
    """Positions before anything is encoded: a pruned picture's tokens are all at its first one."""
    found = positions.clone()
    for one in features:
        place = slice(one.mm_position.offset, one.mm_position.offset + one.mm_position.length)
        if PARTS[int(one.identifier.split()[1])][0] is not None:
            found[1:, place] = found[0, place]
    return found


def test_what_a_picture_keeps_is_known_also_where_its_pixels_stay_behind(there):
    """Otherwise text behind a picture in the prefix cache moves on by its kept tokens alone."""
    fields, same, delta, kept = there(on_resuming)
    of_cpu = ["hiprune_budget", "image_grid_thw"]
    assert fields == [*[of_cpu] * 2, *[[*of_cpu, "pixel_values"]] * 3]
    assert same
    _, _, positions = a_prompt(*PROMPTS["many"])
    assert delta == int(positions.max()) + 1 - positions.shape[1]
    assert all(kept)  # a preempted request brings them along again
    step = there(source, "execute_model")
    if "update_encoder_inputs" in step:
        assert step.index("self.add_requests(") < step.index("update_encoder_inputs")


def forgotten():
    """What is remembered and cached after each of the worker's methods."""
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

    from hiprune_vllm.engine.compat import forget_with_caches

    forget_with_caches()
    left = {}
    for name in ("reset_mm_cache", "reset_encoder_cache", "reload_weights"):
        worker = object.__new__(gpu_worker.Worker)
        runner = object.__new__(model_runner.GPUModelRunner)
        remembered = ["a selection"]
        runner.model = SimpleNamespace(forget=remembered.clear)
        runner.encoder_cache, runner.pooling_runner = EncoderCache(), None
        runner.encoder_cache.encoder_outputs["a"] = torch.zeros(1)
        runner.reset_lora_state = lambda: None
        worker.vllm_config = runner.vllm_config = None
        worker.model_runner = runner
        assert worker.get_model() is runner.model
        with (
            patch.object(model_runner, "reload_weights"),
            patch.object(gpu_worker, "set_current_vllm_config"),
        ):
            getattr(worker, name)()
        left[name] = len(remembered), len(runner.encoder_cache)
    return left


def test_selections_go_where_the_workers_methods_reset_the_newer_runner(there):
    """Otherwise new weights meet selections of the old ones."""
    assert there(forgotten) == {
        "reset_mm_cache": (0, 1),  # of processed inputs, which this runner does not have
        "reset_encoder_cache": (0, 0),
        "reload_weights": (0, 0),
    }


def profiled():
    """What the measurement of memory asks the model for and leaves behind."""
    runner = Runner(dict(enumerate(PARTS)))
    items = [("image", one.data) for one in pictures((2, 0, *PARTS[2]), (2, 9, *PARTS[2]))]
    budget = SimpleNamespace(get_encoder_budget=lambda: 12, mm_max_toks_per_item={"image": 6})
    runner.state.encoder_runner.profile_encoder_cache(items, budget)
    dummy = runner.state.prepare_dummy_inputs(2, 12)
    (batch,) = runner.model.batches
    return len(batch["pixel_values"]), len(runner.cache), {k: v.shape for k, v in dummy.items()}


def test_the_measurement_of_memory_runs_as_requests_do(there):
    """Otherwise the engine ends at its start."""
    count, cached, dummy = there(profiled)
    assert (count, cached) == (2, 2)
    assert dummy == {"inputs_embeds": (12, WIDTH), "positions": (3, 12)}


def a_stage():
    """Our model around a stage that has no layers, and tells the positions that it got."""
    from vllm.sequence import IntermediateTensors

    from hiprune_vllm.engine.compat import ENCODER_BUDGET
    from hiprune_vllm.engine.positions import PrunedMRopeModel

    class OfVllm(torch.nn.Module):
        def __init__(self, *, vllm_config, prefix):
            super().__init__()

        def make_empty_intermediate_tensors(self, batch_size, dtype, device):
            hidden = torch.zeros(batch_size, WIDTH, dtype=dtype, device=device)
            return IntermediateTensors({"hidden_states": hidden})

        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            if intermediate_tensors is None:
                return IntermediateTensors({"hidden_states": inputs_embeds.clone()})
            return torch.cat([intermediate_tensors["hidden_states"], positions.t()], dim=1)

    config = a_config()
    config.model_config.multimodal_config.mm_encoder_tp_mode = "weights"
    config.model_config.multimodal_config.language_model_only = True  # it has no tower
    config.compilation_config.compile_mm_encoder = False
    config.ec_manager_config = SimpleNamespace(encoder_cache_manager_cls=ENCODER_BUDGET)
    config.speculative_config = config.lora_config = None
    from hiprune_vllm.models.qwen2_5_vl import Qwen25VLAdapter

    own = {"family": Qwen25VLAdapter()}
    return type("Stage", (PrunedMRopeModel, OfVllm), own)(vllm_config=config, prefix="")


def a_graph(stage, first, state, received):
    """The runner's own bookkeeping of whole-model graphs, which here run anew at each replay."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils

    manager = object.__new__(cudagraph_utils.ModelCudaGraphManager)
    alone = SimpleNamespace(data_parallel_size=1, data_parallel_rank=0)
    vars(manager).update(
        use_breakable_cg=False, cudagraph_mode=CUDAGraphMode.FULL, max_num_reqs=REQUESTS,
        vllm_config=SimpleNamespace(parallel_config=alone), is_first_pp_rank=first,
        is_last_pp_rank=not first, hidden_states=None, aux_hidden_states=[],
        intermediate_tensors=None,
    )  # fmt: skip
    buffers = SimpleNamespace(
        input_ids=torch.zeros(TOKENS, dtype=torch.int32),
        positions=torch.zeros(TOKENS, dtype=torch.int64),
        is_padding=torch.zeros(TOKENS, dtype=torch.bool),
    )
    graphs = {}

    def capture(self, create, _):
        for size in (8, 4, 2):
            desc = SimpleNamespace(
                num_tokens=size, num_reqs=size, num_active_loras=0, num_ubatches=1,
                cg_mode=CUDAGraphMode.FULL, max_query_len=1, uniform_token_count=1,
            )  # fmt: skip
            graphs[size] = create(desc, False)
            graphs[size](CUDAGraphMode.FULL)

    def replay(size):
        run = patch.object(
            cudagraph_utils.CudaGraphManager,
            "run_fullgraph",
            lambda _, desc: graphs[desc.num_tokens](CUDAGraphMode.FULL),
        )
        with run, patch.object(cudagraph_utils, "set_forward_context"):
            return manager.run_fullgraph(SimpleNamespace(num_tokens=size))

    with (
        patch.object(cudagraph_utils.CudaGraphManager, "capture", capture),
        patch.object(cudagraph_utils, "prepare_inputs_to_capture", lambda *_, **__: (None, None)),
        patch.object(cudagraph_utils, "set_forward_context"),
    ):
        manager.capture(stage, state, buffers, received, None, None, None)
    return replay


def staged():
    """What the second stage of a pipeline computes with, by tokens in a step."""
    positions = torch.zeros(3, TOKENS + 1, dtype=torch.int64)
    embeds = torch.zeros(TOKENS, WIDTH)
    given = SimpleNamespace(
        prepare_dummy_inputs=lambda _, count: {
            "inputs_embeds": embeds[:count],
            "positions": positions[:, :count],
        }
    )
    flat = SimpleNamespace(
        prepare_dummy_inputs=lambda _, count: {"positions": positions.new_zeros(3, count)}
    )
    later = a_stage()
    received = later.make_empty_intermediate_tensors(
        batch_size=TOKENS, dtype=torch.float32, device=torch.device("cpu")
    )
    first, second = a_graph(a_stage(), True, given, None), a_graph(later, False, flat, received)
    found = []
    for size in (4, 8, 2):
        positions.copy_(torch.arange(positions.numel()).view_as(positions) + size)
        embeds.copy_(torch.arange(embeds.numel()).view_as(embeds) + size)
        sent = first(size)
        for name, place in received.tensors.items():  # as the runner's `execute_model`
            place[:size].copy_(sent.tensors[name][:size])
        expected = torch.cat([embeds[:size], positions[:, :size].t()], dim=1)
        found.append((torch.equal(second(size), expected), sent["hidden_states"].shape[0]))
    return found


def test_graphs_of_a_pipelines_stages_hand_positions_on(there):
    """Otherwise later stages see kept tokens in wrong places once graphs are replayed."""
    assert there(staged) == [(True, 4), (True, 8), (True, 2)]


def adapted():
    from vllm.v1.worker.gpu.mm.lora import set_active_mm_loras

    of_language = SimpleNamespace(supports_tower_connector_lora=lambda: False)
    return set_active_mm_loras(
        model=None, lora_manager=of_language, encoder_cache=object(), req_id_to_index={},
        lora_state=None, scheduled_encoder_inputs={"a": [0]},
    )  # fmt: skip


def test_adapters_of_the_language_model_leave_the_encoder_alone(there):
    """Otherwise vLLM asks our model how many tokens its tower has for an adapter."""
    assert there(adapted) is None


def missing_features():
    """What vLLM says that the newer runner cannot do, of what we serve."""
    from vllm.config import VllmConfig

    parallel = SimpleNamespace(
        distributed_executor_backend="mp", pipeline_parallel_size=2, use_ubatching=False
    )
    draft = SimpleNamespace(method="ngram", parallel_drafting=False)
    return [
        VllmConfig._get_v2_model_runner_unsupported_features(
            SimpleNamespace(parallel_config=parallel, speculative_config=speculative)
        )
        for speculative in (None, draft)
    ]


def test_cuda_engines_have_the_newer_runner_unless_somebody_says_otherwise(there):
    """Where this fails CUDA engines have the older one under some flags: say so in the docs."""
    assert there(missing_features) == [[], []]
