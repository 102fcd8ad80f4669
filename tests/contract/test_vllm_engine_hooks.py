"""Hooks of the scheduler and of the model runner's loop that the plugin relies on.

Names, signatures and call conventions of the installed vLLM; no engine is started.
"""

import inspect
import pickle

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import config as model_configs
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from hiprune_server.demo import CHECKPOINT
from hiprune_vllm.engine.compat import check_engine
from hiprune_vllm.engine.registration import CLASSES
from hiprune_vllm.engine.scheduling import WholeImageBudget


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


@pytest.mark.installed_release
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


def test_no_model_that_is_served_has_a_configuration_hook_of_vllms():
    source = inspect.getsource(model_configs)
    for architecture in CLASSES:
        assert f'"{architecture}": ' not in source


def test_the_older_runner_reads_what_is_switched_off_where_a_step_has_no_media():
    gather = inspect.unwrap(GPUModelRunner._gather_mm_embeddings)
    assert parameters(gather) == ["self", "scheduler_output", "shift_computed_tokens"]
    source = inspect.getsource(gather)
    assert "if self.is_multimodal_pruning_enabled and self.uses_mrope:" in source
    assert "for req_id in self.input_batch.req_ids:" in source
    assert "req_state = self.requests[req_id]" in source
    assert "req_state.num_computed_tokens + shift_computed_tokens" in source
    assert "mm_features = req_state.mm_features" in source
