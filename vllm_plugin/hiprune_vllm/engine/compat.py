"""Which engine options this plugin cannot work with, and what it changes in vLLM."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from typing import Any, Final

from vllm.config import MultiModalConfig
from vllm.distributed import get_pp_group

from hiprune_vllm import tuning

ENCODER_BUDGET: Final = "hiprune_vllm.engine.scheduling.WholeImageBudget"
"""Class by which the scheduler counts what is encoded."""


SEEING_DRAFTS: Final = ("mtp", "eagle", "eagle3")
"""Methods of speculative decoding whose drafts are to see images one token ahead."""

BLIND_DRAFTS: Final = ("dflash", "dspark")
"""Methods whose drafts number tokens by the target's positions in a way of their own."""


def check_engine(vllm_config: Any) -> None:
    """Refuses engine options under which pruning would be wrong.

    Raises:
        ValueError: naming the option and what to do instead.
    """
    tuning.check()
    speculative = vllm_config.speculative_config
    # Where drafts are looked up in the prompt vLLM names the served model as the draft.
    modelled = speculative is not None and not speculative.use_ngram()
    draft = speculative.draft_model_config if modelled else None
    if draft is not None and draft.is_multimodal_model and speculative.method not in SEEING_DRAFTS:
        raise ValueError(
            "hiprune-vllm cannot serve speculative decoding with a multimodal model as the draft, "
            f"which vLLM gives images one token ahead: got {draft.model!r} by the method "
            f"{speculative.method!r}. Use a text-only draft, ngram, a method of "
            f"{', '.join(SEEING_DRAFTS)}, or none."
        )
    if modelled and vllm_config.model_config.uses_mrope and speculative.method in BLIND_DRAFTS:
        raise ValueError(
            "hiprune-vllm cannot keep drafts of the method "
            f"{speculative.method!r} inside their table of rotary embeddings beside a model with "
            f"3-D positions. Use a method of {', '.join(SEEING_DRAFTS)}, ngram, or none."
        )
    if vllm_config.compilation_config.compile_mm_encoder:
        raise ValueError(
            "hiprune-vllm reads the queries and keys of two encoder layers, which a compiled "
            "encoder hides: compile_mm_encoder must be false. Remove it from --compilation-config."
        )
    counts = vllm_config.ec_manager_config.encoder_cache_manager_cls
    if counts != ENCODER_BUDGET:
        raise ValueError(
            "hiprune-vllm bounds what one engine step encodes by a cache manager of its own: "
            f"encoder_cache_manager_cls must be unset, got {counts!r}. Remove --ec-manager-config."
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        raise ValueError(
            "hiprune-vllm chooses tokens in the vision tower as it is, for requests with and "
            "without an adapter together: --enable-tower-connector-lora must be off. Remove the "
            "flag, adapters of the language model work; or merge the adapter into the checkpoint."
        )


def charge_whole_images(architectures: Iterable[str]) -> None:
    """Makes the scheduler charge an image by all its tokens, in engines of these models.

    Symptom: many images of few kept tokens are encoded in one engine step, and all other requests
        wait for it.
    Cause: the scheduler charges the step's encoder budget by an image's placeholder tokens, which
        are the kept ones, where the tower works on all.
    Change: engines of these models have a cache manager that counts whole images, by vLLM's own
        setting for one. It is set where vLLM lets a model adapt the configuration, once, in the
        process that makes it. Idempotent.
    Remove when: vLLM charges compute apart from memory.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    for architecture in architectures:
        of_vllm = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not hasattr(of_vllm, "counts_whole_images"):
            MODELS_CONFIG_MAP[architecture] = _and_count(of_vllm)


def _and_count(of_vllm: Any) -> Any:
    class CountsWholeImages(of_vllm):
        counts_whole_images = True

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            of_vllm.verify_and_update_config(vllm_config)
            chosen = vllm_config.ec_manager_config
            if chosen.encoder_cache_manager_cls is None:
                chosen.encoder_cache_manager_cls = ENCODER_BUDGET

    return CountsWholeImages


RESETS: Final = (
    "reset_mm_cache",
    "reset_encoder_cache",
    "reload_weights",
    "wake_up",
    "update_weights",
    "finish_weight_update",
)
"""Methods of vLLM's worker after which what was encoded before is worth nothing."""


def forget_with_caches() -> None:
    """Makes the worker's model forget its selections wherever vLLM drops what was encoded.

    Symptom: after new weights (`/update_weights`, `reload_weights`, level 2 sleep) a picture that
        was seen before keeps the tokens that the old weights chose.
    Cause: vLLM knows of its own encoder cache alone.
    Change: `forget` of the model, where it has one, runs after each of `RESETS`. For every platform
        whose worker is derived from vLLM's, what it overrides included. Idempotent.
    Remove when: vLLM tells a model that its encoder cache was reset.
    """
    from vllm.v1.worker.gpu_worker import Worker

    for worker in (Worker, *_derived(Worker)):
        for name in RESETS:
            method = vars(worker).get(name)
            if method is not None and not hasattr(method, "forgets"):
                setattr(worker, name, _and_forget(method))


def _derived(cls: Any) -> Iterator[Any]:
    for one in cls.__subclasses__():
        yield one
        yield from _derived(one)


def _and_forget(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:  # weights that came in part are others, too
            forget = getattr(self.get_model(), "forget", None)
            if forget is not None:
                forget()

    reset.forgets = True  # type: ignore[attr-defined]
    return reset


class _PositionsWithEmbeddings(MultiModalConfig):
    """A configuration that says "pruning is on" without the video pruning it is tied to."""

    def is_multimodal_pruning_enabled(self) -> bool:
        return True


def carry_positions_with_embeddings(vllm_config: Any) -> None:
    """Makes the model runner call `recompute_mrope_positions` for this engine's model.

    Symptom: kept tokens get the positions of their place in the shortened prompt.
    Cause: the runner asks `MultiModalConfig.is_multimodal_pruning_enabled`, which knows video
        pruning only.
    Change: this one configuration object answers yes.
    Remove when: vLLM asks the model instead.

    Raises:
        ValueError: vLLM's own video pruning is on; both would write the same positions.
    """
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal.video_pruning_rate:
        raise ValueError(
            "hiprune-vllm and vLLM's video pruning cannot both change positions: "
            f"--video-pruning-rate must be unset, got {multimodal.video_pruning_rate}"
        )
    multimodal.__class__ = _PositionsWithEmbeddings


def _has_media(runner: Any) -> bool:
    """Whether a request of the step at hand has images or videos that are not behind it."""
    for name in runner.input_batch.req_ids:
        request = runner.requests[name]
        if request.mm_features:
            last = request.mm_features[-1].mm_position
            if last.offset + last.length > request.num_computed_tokens:
                return True
    return False


def recompute_positions_where_needed() -> None:
    """Makes the older model runner skip `recompute_mrope_positions` where nothing is to be learnt.

    Symptom: with 3-D positions every decoding request, pruned or not, takes 6 us of each step; with
        a draft model that sees images, kept tokens of a chunk get their neighbours' positions.
    Cause: the runner recomputes the positions of all requests in every step, and copies them, also
        where there is no embedding that brings any; and once more with what it gathers for a draft,
        which begins one token later than it says.
    Change: in a step without media it works as without pruning, and a draft's embeddings lose
        their positions, which are known by then. Idempotent.
    Remove when: it passes over requests without embeddings and strips those of drafts, as the
        newer runner does.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather = GPUModelRunner._gather_mm_embeddings
    if hasattr(gather, "of_vllm"):
        return

    @wraps(gather)
    def gather_for_media(self: Any, scheduler_output: Any, shift_computed_tokens: int = 0) -> Any:
        enabled, draft = self.is_multimodal_pruning_enabled, shift_computed_tokens > 0
        self.is_multimodal_pruning_enabled = enabled and not draft and _has_media(self)
        try:
            embeddings, places = gather(self, scheduler_output, shift_computed_tokens)
        finally:
            self.is_multimodal_pruning_enabled = enabled
        if enabled and draft:
            embeddings = self.get_model().without_positions(embeddings)
        return embeddings, places

    gather_for_media.of_vllm = gather  # type: ignore[attr-defined]
    GPUModelRunner._gather_mm_embeddings = gather_for_media


def keep_pruned_images_out_of_graphs() -> None:
    """Makes vLLM's captured encoder leave batches with pruned images to the model.

    Symptom: with `cudagraph_mm_encoder` a pruned image comes with all its tokens, of which the
        prompt has fewer: the engine ends.
    Cause: a captured graph runs instead of the model's `embed_multimodal`.
    Change: the model is asked first; where it says None both runners call `embed_multimodal`, as
        for what has no graph. Idempotent.
    Remove when: a model can say which items have a graph.
    """
    from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

    execute = EncoderCudaGraphManager.execute
    if hasattr(execute, "of_vllm"):
        return

    @wraps(execute)
    def ask_first(self: Any, mm_kwargs: dict[str, Any]) -> Any:
        ask = getattr(self.model, "through_graphs", None)
        run = partial(execute, self)
        return run(mm_kwargs) if ask is None else ask(run, mm_kwargs)

    ask_first.of_vllm = execute  # type: ignore[attr-defined]
    EncoderCudaGraphManager.execute = ask_first


ADAPTER_OPERATIONS: Final = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
"""Of the CPU engine; each takes rows, weights by adapter, the output and each row's adapter."""


def keep_adapters_to_their_requests() -> None:
    """Makes the CPU engine leave requests without an adapter alone; changes nothing elsewhere.

    Symptom: on the CPU engine a request for the served model itself is answered as by another
        request's adapter (LoRA) that is in the same batch, without this plugin as well.
    Cause: rows without an adapter have the number -1, which there picks the last one.
    Change: such rows are zero on their way in, so that they add nothing. Idempotent.
    Remove when: 0.32 is no longer served; since 0.33 vLLM's own pass over -1, as its kernels do.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ADAPTER_OPERATIONS:
        operation = getattr(lora_ops, name)
        if hasattr(operation, "of_vllm"):
            continue
        changed = _for_rows_with_adapter(operation)
        # The wrapper has names of its own; operations for prefills call those of the module.
        setattr(lora_ops, name, changed)
        setattr(punica_cpu, name, changed)


def _for_rows_with_adapter(operation: Callable[..., None]) -> Callable[..., None]:
    @wraps(operation)
    def pass_over(
        inputs: Any, weights: Any, output: Any, adapters: Any, *args: Any, **kwargs: Any
    ) -> None:
        rows = inputs * (adapters >= 0).unsqueeze(1)
        operation(rows, weights, output, adapters, *args, **kwargs)

    pass_over.of_vllm = operation  # type: ignore[attr-defined]
    return pass_over


def _after_cpu_load(then: Callable[[Any], None]) -> None:
    """Runs `then` with every CPU model runner that has loaded its model.

    Does nothing on other platforms, nor a second time. To be called before a model is loaded: the
    runner imports the model's class when it is made, which is early enough.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model
    steps = getattr(load_model, "steps_after", ())
    if then in steps:
        return

    def load_model_and_more(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        then(self)

    load_model_and_more.steps_after = (*steps, then)  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model_and_more


def _ask(runner: Any) -> None:
    multimodal = runner.model_config.multimodal_config
    runner.is_multimodal_pruning_enabled = (
        multimodal is not None
        and multimodal.is_multimodal_pruning_enabled()
        and getattr(runner.get_model(), "supports_multimodal_pruning", False)
    )


def let_cpu_runner_ask() -> None:
    """Makes `CPUModelRunner.load_model` ask whether pruning is on; does nothing elsewhere.

    Symptom: on the CPU engine kept tokens get no 3-D positions and have the wrong width.
    Cause: it overrides `GPUModelRunner.load_model` without the lines that set the flag.
    Change: those lines run after it. Idempotent.
    Remove when: the CPU runner sets the flag itself.
    """
    _after_cpu_load(_ask)


def _make_room(runner: Any) -> None:
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens,
            dtype=runner.model_config.dtype,
            device=runner.device,
        )


def let_cpu_runner_receive() -> None:
    """Makes room on the CPU for what a stage of a pipeline receives; does nothing elsewhere.

    Symptom: with --pipeline-parallel-size and --enforce-eager the first request ends the engine
        (an assertion in `sync_and_gather_intermediate_tensors`), without this plugin as well.
    Cause: the room is made in a dummy run, which the CPU worker leaves out where nothing is
        compiled.
    Change: it is made once the model is loaded, as on a GPU by vLLM's newer runner. Idempotent.
    Remove when: the CPU worker makes it itself.
    """
    _after_cpu_load(_make_room)
