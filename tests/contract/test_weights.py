"""Where vLLM drops what it has encoded: the worker's model forgets its selections there."""

import inspect
import re

import pytest
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from hiprune_vllm.engine import compat
from hiprune_vllm.engine.model import PrunedModel


def source(function):
    return inspect.getsource(inspect.unwrap(function))


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    for worker in (Worker, CPUWorker):
        for name in compat.RESETS:
            if name in vars(worker):  # put back behind the test
                monkeypatch.setattr(worker, name, inspect.unwrap(vars(worker)[name]))
    compat.forget_with_caches()
    compat.forget_with_caches()  # as in a process that makes two models


class Model:
    def __init__(self):
        self.remembered = ["a selection"]

    def forget(self):
        PrunedModel.forget(self)

    @property
    def _kept_before(self):
        return self.remembered


def worker_with(cls, model, **methods):
    one = object.__new__(type("Fake", (cls,), {}))
    one.model_runner = type(
        "Runner",
        (),
        {"get_model": lambda self: model}
        | {name: lambda self, *a, **k: None for name in ("reset_mm_cache", "reset_encoder_cache")},
    )()
    return one


@pytest.mark.parametrize("cls", [Worker, CPUWorker])
@pytest.mark.parametrize("name", ["reset_mm_cache", "reset_encoder_cache"])
def test_selections_go_where_the_encoder_cache_goes(cls, name):
    model = Model()
    getattr(worker_with(cls, model), name)()
    assert model.remembered == []


def test_selections_go_also_where_new_weights_came_in_part():
    model = Model()
    worker = worker_with(Worker, model)
    with pytest.raises(AttributeError):  # the fake has no engine that transfers weights
        worker.update_weights({})
    assert model.remembered == []


def test_a_model_that_remembers_nothing_is_left_alone():
    worker_with(Worker, object()).reset_encoder_cache()


def test_every_reset_is_a_method_of_vllms_worker_and_wrapped_once():
    for name in compat.RESETS:
        method = getattr(CPUWorker, name)
        assert method.forgets
        assert not hasattr(method.__wrapped__, "__wrapped__")


def test_what_changes_weights_comes_through_one_of_them():
    assert "self.reset_mm_cache()" in source(EngineCore._reset_caches)
    assert "self.reset_encoder_cache()" in source(EngineCore._reset_caches)
    assert "self._reset_caches()" in source(EngineCore._finish_pause)
    # Sleep pauses with `clear_cache`; a level that keeps the weights as they are need not.
    assert re.search(
        r"self\.pause_scheduler\(mode=mode, clear_cache=clear_prefix_cache\)",
        source(EngineCore.sleep),
    )
    for name in ("reset_mm_cache", "reset_encoder_cache"):
        assert f"self.model_executor.{name}()" in source(getattr(EngineCore, name))
    known = {*compat.RESETS, "start_weight_update", "start_draft_weight_update", "reset_weights"}
    changing = {
        name
        for name, method in vars(Worker).items()
        if callable(method) and re.search(r"weight", name) and not name.startswith("_")
    }
    harmless = {
        "compute_weight_checksums",
        "init_weight_transfer_engine",
        "shutdown_weight_transfer_engine",
        "supports_draft_weight_updates",
    }
    assert changing - harmless <= known, "vLLM has another way to change weights"
