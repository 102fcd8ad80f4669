"""Hooks of the scheduler and of the model runner's loop that the plugin relies on.

Names, signatures and call conventions of the installed vLLM; no engine is started.
"""

import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models import config as model_configs
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from hiprune_server.demo import CHECKPOINT
from hiprune_vllm.engine.compat import (
    ADAPTER_OPERATIONS,
    ENCODER_BUDGET,
    charge_whole_images,
    check_engine,
    keep_adapters_to_their_requests,
)
from hiprune_vllm.engine.registration import CLASSES
from hiprune_vllm.engine.scheduling import WholeImageBudget
from hiprune_vllm.models.unserved import UNSERVED


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_scheduler_asks_the_cache_manager_before_it_encodes_and_once_a_step_what_to_free():
    assert parameters(EncoderCacheManager.can_allocate) == [
        "self",
        "request",
        "input_id",
        "encoder_compute_budget",
        "num_embeds_to_schedule",
    ]
    assert parameters(EncoderCacheManager.allocate) == ["self", "request", "input_id"]
    assert parameters(EncoderCacheManager.get_freed_mm_hashes) == ["self"]
    assert parameters(EncoderCacheManager.create_manager) == ["cache_size", "vllm_config"]
    asked = inspect.getsource(Scheduler._try_schedule_encoder_inputs)
    assert asked.index("num_embeds_to_schedule = 0") < asked.index("for i in range(lo, hi):")
    assert asked.index("manager.can_allocate(") < asked.index("encoder_inputs_to_schedule.append")
    schedule = inspect.getsource(Scheduler.schedule)
    assert schedule.count("get_freed_mm_hashes()") == 1
    assert "encoder_compute_budget = self.max_num_encoder_input_tokens" in schedule
    assert schedule.count("self._allocate_encoder_inputs(") == 2


@pytest.mark.parametrize("given", [None, "theirs.Manager"])
def test_the_scheduler_counts_whole_images_unless_an_operator_says_otherwise(given):
    options = {"ec_manager_config": {"encoder_cache_manager_cls": given}} if given else {}
    config = EngineArgs(str(CHECKPOINT), max_model_len=4096, **options).create_engine_config()
    config = pickle.loads(pickle.dumps(config))  # as it gets to the engine's process
    if given:
        with pytest.raises(ValueError, match=r"got 'theirs\.Manager'\. Remove --ec-manager-config"):
            check_engine(config)
        return
    check_engine(config)
    manager = config.ec_manager_config.get_encoder_cache_manager_obj()
    assert manager is WholeImageBudget
    assert type(manager.create_manager(cache_size=9, vllm_config=config)) is WholeImageBudget


def test_a_configuration_hook_of_vllms_still_runs_before_ours(monkeypatch):
    """Some models have one, such as Qwen3.5 for its states."""
    seen = []

    class OfVllm(model_configs.VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config):
            seen.append(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config):
            seen.append(model_config)

    hooks = {"Has": OfVllm}
    monkeypatch.setattr(model_configs, "MODELS_CONFIG_MAP", hooks)
    charge_whole_images(["Has", "HasNone"])
    once = dict(hooks)
    charge_whole_images(["Has", "HasNone"])
    assert hooks == once
    for name in ("Has", "HasNone"):
        config = SimpleNamespace(ec_manager_config=SimpleNamespace(encoder_cache_manager_cls=None))
        hooks[name].verify_and_update_config(config)
        assert config.ec_manager_config.encoder_cache_manager_cls == ENCODER_BUDGET
        hooks[name].verify_and_update_model_config("model")
        assert seen == [config, "model"] if name == "Has" else len(seen) == 2


def test_the_older_runner_reads_what_is_switched_off_where_a_step_has_no_media():
    gather = inspect.unwrap(GPUModelRunner._gather_mm_embeddings)
    assert parameters(gather) == ["self", "scheduler_output", "shift_computed_tokens"]
    source = inspect.getsource(gather)
    assert "if self.is_multimodal_pruning_enabled and self.uses_mrope:" in source
    assert "for req_id in self.input_batch.req_ids:" in source
    assert "req_state = self.requests[req_id]" in source
    assert "req_state.num_computed_tokens + shift_computed_tokens" in source
    assert "mm_features = req_state.mm_features" in source


def test_rows_without_an_adapter_would_get_the_last_one_and_now_get_none(monkeypatch):
    for module in (lora_ops, punica_cpu):
        for name in ADAPTER_OPERATIONS:
            operation = getattr(module, name)
            monkeypatch.setattr(module, name, getattr(operation, "of_vllm", operation))
    rows, adapters = torch.ones(3, 4), torch.tensor([0, -1, 1])
    weights = torch.stack([torch.full((2, 4), 1.0), torch.full((2, 4), 10.0)])

    def added(name, *more):
        found = torch.zeros(3, 2)
        getattr(punica_cpu, name)(rows, weights, found, *more)
        return found[:, 0].tolist()

    lengths = torch.ones(3, dtype=torch.int64)
    prefill = (lengths.cumsum(0), lengths, adapters, 3, 1, 3)
    calls = [
        ("bgmv_shrink", adapters, 1.0),
        ("bgmv_expand", adapters, True),
        ("bgmv_expand_slice", adapters, 0, 2, True),
        ("sgmv_shrink", *prefill, 1.0),
        ("sgmv_expand", *prefill, True),
        ("sgmv_expand_slice", *prefill, 0, 2, True),
    ]
    found = [added(*call) for call in calls]
    assert found in ([[4, 40, 40]] * 6, [[4, 0, 40]] * 6)  # "remove when" none has the first
    keep_adapters_to_their_requests()
    keep_adapters_to_their_requests()
    assert [added(*call) for call in calls] == [[4, 0, 40]] * 6


def test_what_is_named_as_unserved_is_a_model_of_vllms_and_has_no_adapter():
    known = set(ModelRegistry.get_supported_archs())
    assert set(UNSERVED) <= known
    assert set(CLASSES) <= known
    assert not set(UNSERVED) & set(CLASSES)
