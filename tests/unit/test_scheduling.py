"""What one engine step encodes, by vLLM's own scheduler: requests as stand-ins, no engine."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched import scheduler as vllm_scheduler
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from hiprune_server.demo import CHECKPOINT
from hiprune_vllm.engine.scheduling import WholeImageBudget, tokens_encoded, with_size

BLOCK = 16
IMAGE, TEXT = 7, 3


@pytest.fixture(scope="module")
def config():
    init_none_hash(sha256)
    arguments = EngineArgs(str(CHECKPOINT), dtype="float32", max_model_len=4096)
    return arguments.create_engine_config()


@dataclass(frozen=True)
class Picture:
    """A picture in a prompt: `full` tokens, of which `kept` stay, behind `text` tokens."""

    name: str
    full: int
    kept: int
    text: int = 0


@dataclass
class Step:
    encoded: list[Picture]
    computed: dict[str, int]

    @property
    def work(self):
        return sum(picture.full for picture in self.encoded)


@dataclass
class Engine:
    """vLLM's scheduler, and a worker that notes what it would do and has what it needs."""

    scheduler: vllm_scheduler.Scheduler
    pictures: dict[str, Picture] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)

    def add(self, name, pictures, *, text=5, answer=2):
        prompt, features = [TEXT], []
        for one in pictures:
            prompt += [TEXT] * one.text
            identity = with_size(one.name, one.full)
            place = PlaceholderRange(offset=len(prompt), length=one.kept)
            features.append(MultiModalFeatureSpec(None, "image", identity, place))
            self.pictures[identity] = one
            prompt += [IMAGE] * one.kept
        sampling = SamplingParams(max_tokens=answer, ignore_eos=True)
        sampling.update_from_generation_config({}, 2)
        request = Request(
            name,
            prompt + [TEXT] * text,
            sampling,
            None,
            mm_features=features,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.scheduler.add_request(request)
        self.waiting.add(name)

    def run(self, limit=3000):
        """All steps until every request has its answer."""
        stored, steps = set(), []
        while self.scheduler.has_unfinished_requests():
            assert len(steps) < limit, "requests wait without end"
            out = self.scheduler.schedule()
            requests = self.scheduler.requests
            stored -= set(out.free_encoder_mm_hashes)
            encoded = [
                requests[name].mm_features[i].identifier
                for name, items in out.scheduled_encoder_inputs.items()
                for i in items
            ]
            stored |= set(encoded)
            sampled = {}
            for name, count in out.num_scheduled_tokens.items():
                request = requests[name]
                # vLLM has moved on already where it schedules; the step began before.
                begin = request.num_computed_tokens - count
                for feature in request.mm_features:
                    start = feature.mm_position.offset
                    if start < begin + count and start + feature.mm_position.length > begin:
                        assert feature.identifier in stored, "embeddings that are not there"
                done = begin + count >= request.num_tokens
                sampled[name] = [TEXT] if done else []
            names = list(sampled)
            steps.append(Step([self.pictures[i] for i in encoded], dict(out.num_scheduled_tokens)))
            results = self.scheduler.update_from_output(
                out,
                ModelRunnerOutput(
                    names, {name: i for i, name in enumerate(names)}, list(sampled.values())
                ),
            )
            for outputs in results.values():
                for one in outputs.outputs:
                    if one.finish_reason is not None:
                        assert str(one.finish_reason) == "length"
                        self.waiting.discard(one.request_id)
        assert not self.waiting
        return steps


@pytest.fixture(scope="module")
def engine(config):
    grammars = StructuredOutputManager(config)

    def make(*, budget, cache, tokens=2048, blocks=512, lookahead=0, manager=WholeImageBudget,
             cls=vllm_scheduler.Scheduler):  # fmt: skip
        sizes = SimpleNamespace(encoder_compute_budget=budget, encoder_cache_size=cache)
        layer = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm_scheduler, "MultiModalBudget", lambda *_: sizes)
            config.cache_config.num_gpu_blocks = blocks
            made = cls(
                config,
                KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], layer)]),
                grammars,
                BLOCK,
            )
        made.max_num_scheduled_tokens = tokens
        made.num_prefill_lookahead = lookahead
        assert type(made.encoder_cache_manager) is WholeImageBudget
        made.encoder_cache_manager = (
            manager(cache, lookahead) if manager is WholeImageBudget else manager(cache)
        )
        return Engine(made)

    return make


def one_token(count, full=576):
    return [Picture(f"p{i}", full, 1) for i in range(count)]


def test_pictures_of_one_token_spread_over_as_many_steps_as_whole_ones_do(engine):
    few = engine(budget=2048, cache=2048)
    few.add("few", one_token(64))
    steps = few.run()
    assert [len(step.encoded) for step in steps if step.encoded] == [3] * 21 + [1]

    stock = engine(budget=2048, cache=2048, manager=EncoderCacheManager)
    stock.add("few", one_token(64))
    assert [len(step.encoded) for step in stock.run() if step.encoded] == [64]  # the fault


def test_a_request_beside_goes_on_in_every_step(engine):
    both = engine(budget=2048, cache=2048)
    both.add("decoding", [], answer=40)
    both.add("few", one_token(64))
    steps = both.run()
    assert all(step.computed.get("decoding") for step in steps[:40])
    assert max(step.work for step in steps) <= 2048


def test_many_requests_of_one_picture_spread_like_one_request_of_many(engine):
    many = engine(budget=2048, cache=2048)
    for i, one in enumerate(one_token(20)):
        many.add(f"r{i}", [one])
    steps = many.run()
    assert [len(step.encoded) for step in steps if step.encoded] == [3] * 6 + [2]


def test_a_picture_larger_than_the_budget_is_encoded_in_a_step_of_its_own(engine):
    large = engine(budget=2048, cache=2048)
    large.add("a", [Picture("x", 576, 1), Picture("y", 16384, 64), Picture("z", 576, 1)])
    assert [[p.name for p in s.encoded] for s in large.run() if s.encoded] == [["x"], ["y"], ["z"]]


def test_a_picture_that_is_known_costs_nothing(engine):
    again = engine(budget=2048, cache=2048)
    again.add("a", one_token(3), answer=30)
    again.add("b", [*one_token(3), Picture("new", 2048, 1)])
    steps = [[p.name for p in step.encoded] for step in again.run() if step.encoded]
    assert steps == [["p0", "p1", "p2"], ["new"]]


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("text", [0, 1, 2])
def test_pictures_side_by_side_do_not_wait_without_end_for_a_draft_model(engine, lookahead, text):
    """vLLM stops before the picture behind, and by as many tokens more as a draft looks ahead."""
    drafted = engine(budget=2880, cache=2880, lookahead=lookahead)
    drafted.add("a", [Picture(f"p{i}", 2880, 1, text) for i in range(12)])
    steps = drafted.run(limit=100)
    assert sum(len(step.encoded) for step in steps) == 12
    assert max(len(step.encoded) for step in steps) <= 1 + lookahead


@st.composite
def workloads(draw, *, whole=False):
    """Requests whose pictures are shared, pruned or whole, at the start, side by side or apart."""
    pool = [
        Picture(f"p{i}", full, full if whole else draw(st.sampled_from([1, 2, full // 9, full])))
        for i, full in enumerate(draw(st.lists(st.sampled_from([20, 64, 256, 576]), min_size=1)))
    ]
    shown = st.builds(
        lambda one, text: Picture(one.name, one.full, one.kept, text),
        st.sampled_from(pool),
        st.sampled_from([0, 0, 1, 15, 40]),
    )
    requests = draw(st.lists(st.lists(shown, max_size=12), min_size=1, max_size=6))
    return [pictures for pictures in requests if sum(p.kept + p.text for p in pictures) < 4000]


@settings(max_examples=500, deadline=None)
@given(
    workload=workloads(),
    budget=st.sampled_from([576, 600, 1152, 2048]),
    room=st.sampled_from([576, 900, 2048]),
    tokens=st.sampled_from([16, 64, 577, 2048]),
    blocks=st.sampled_from([300, 400, 4096]),
    lookahead=st.sampled_from([0, 0, 1]),
)
def test_whatever_is_asked_ends_and_no_step_encodes_more_than_the_budget(
    engine, workload, budget, room, tokens, blocks, lookahead
):
    if lookahead:  # in a cache of one picture two side by side wait without end in vLLM as it is
        room = 100_000
    some = engine(budget=budget, cache=room, tokens=tokens, blocks=blocks, lookahead=lookahead)
    for i, pictures in enumerate(workload):
        some.add(f"r{i}", pictures)
    steps = some.run()
    for step in steps:
        along = lookahead * len(step.computed) * 576
        assert step.work <= budget + along
    kept = some.scheduler.encoder_cache_manager
    assert kept.num_freeable_slots == room  # nothing is held for ever


@settings(max_examples=20, deadline=None)
@given(workload=workloads(whole=True), tokens=st.sampled_from([16, 577, 2048]))
def test_unpruned_pictures_are_scheduled_as_vllm_does(engine, workload, tokens):
    ways = []
    for manager in (WholeImageBudget, EncoderCacheManager):
        one = engine(budget=1152, cache=1152, tokens=tokens, manager=manager, blocks=4096)
        for i, pictures in enumerate(workload):
            one.add(f"r{i}", pictures)
        ways.append(one.run())
    assert ways[0] == ways[1]


def test_the_asynchronous_scheduler_counts_the_same_way(engine):
    assert AsyncScheduler.schedule is vllm_scheduler.Scheduler.schedule
    made = engine(budget=2048, cache=2048, cls=AsyncScheduler)
    made.add("few", one_token(64))
    encoded = []
    for _ in range(30):  # scheduled ahead: no output comes back in between
        out = made.scheduler.schedule()
        encoded += [len(items) for items in out.scheduled_encoder_inputs.values()]
    assert encoded == [3] * 21 + [1]


@pytest.mark.parametrize(
    ("modality", "identity", "work"),
    [
        ("image", with_size("0a1b", 576), 576),
        ("image", f"adapter:{with_size('0a1b', 576)}", 576),
        ("image", "0a1b", 64),
        ("image", "550e8400-e29b-41d4-a716-446655440000", 64),  # a client's `uuid`
        ("image", with_size("0a1b", 3), 64),  # never fewer than are kept
        ("image", "x-whole-", 64),
        ("image", "x-whole-²", 64),
        ("video", with_size("0a1b", 576), 576),
        ("audio", with_size("0a1b", 576), 64),
    ],
)
def test_an_identity_tells_what_a_picture_costs(modality, identity, work):
    place = PlaceholderRange(offset=0, length=64)
    assert tokens_encoded(MultiModalFeatureSpec(None, modality, identity, place)) == work
