"""Each family proves at start-up that vLLM still does what its adapter takes for granted."""

from typing import Any, Final

from vllm.multimodal.processing import ProcessorInputs, TimingContext

from hiprune_vllm.engine.processing import THIRD
from hiprune_vllm.engine.wire import BUDGET_FIELD, unpack_item
from hiprune_vllm.plan import FIELD, FULL, PruningPlan

SIZE: Final = (360, 230)
"""Width and height of the dummy picture, pixels: neither square nor a multiple of any patch."""


def prove(processor: Any) -> None:
    """One small picture through processor and placeholder arithmetic, whole and pruned.

    Tens of milliseconds, where a drifted processor would otherwise show at the first request.
    Nothing to prove where this checkpoint is not pruned or pictures are not let in.

    Raises:
        RuntimeError: "version drift", with what was expected and what came. No ValueError: vLLM
            takes one for "has no images" here and there, and starts without them.
    """
    info, pruning = processor.info, processor.pruning
    pictures = info.ctx.tokenizer is not None and info.allowed_mm_limits.get(
        pruning.family.modality
    )
    if pruning.encoder is None or not pictures:
        return
    for plan in (FULL, THIRD):
        try:
            _prove(processor, plan)
        except RuntimeError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"version drift: expected a dummy picture of {SIZE[0]} x {SIZE[1]} pixels with the "
                f"plan {plan.to_dict()} to be processed, got {type(error).__name__}: {error}"
            ) from error


def _prove(processor: Any, plan: PruningPlan) -> None:
    info, builder, modality = processor.info, processor.dummy_inputs, processor.modality
    (picture,) = builder._get_dummy_images(width=SIZE[0], height=SIZE[1], num_images=1)
    item_of_vllm = processor.pruning.family.item(picture)
    text = builder.get_dummy_text({modality: 1}) + "."
    result = processor.apply(
        ProcessorInputs(
            prompt=info.get_tokenizer().encode(text),
            mm_data_items=info.parse_mm_data({modality: [item_of_vllm]}),
            hf_processor_mm_kwargs={FIELD: plan},
        ),
        TimingContext(enabled=False),
    )
    (report,) = result[FIELD]
    full, kept = report["tokens_full"], report["tokens_kept"]
    (item,) = result["mm_kwargs"][modality]
    (place,) = result["mm_placeholders"][modality]
    data = item.get_data()
    budget, _ = unpack_item(data.pop(BUDGET_FIELD).tolist())
    encoded = processor.pruning.family.encoded_tokens(info.get_hf_config(), data)
    for what, expected, got in (
        ("tokens in the encoder's input", full, encoded),
        ("tokens of the whole picture in its row", full, budget.full),
        ("kept tokens in its row", kept, budget.keep),
        ("placeholder tokens for embeddings", kept, place.get_num_embeds()),
    ):
        if expected != got:
            raise RuntimeError(f"version drift: expected {expected} {what}, got {got}")
