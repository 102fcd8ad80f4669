"""Draft models beside pictures with 3-D positions, in vLLM's older model runner.

A pruned prompt is shorter than its positions say, so what a draft takes a token's position for has
to be told apart: its place in the cache, and its rotary position. Greedy answers do not depend on
a draft; how much of it is accepted does, and a position outside of its table ends the engine.
"""

from functools import wraps
from typing import Any

import torch

from hiprune_vllm.engine.rotary_table import TABLE_FACTOR, rotary_rows


def tell_places_from_positions() -> None:
    """Makes the older runner's drafts count tokens by their places in the prompt. Idempotent.

    Symptom: beside a model with 3-D positions next to nothing of a draft's later tokens is
        accepted; a draft of text alone reads past its table of rotary embeddings.
    Cause: the proposer finds the place in the cache by the temporal position, and hands the
        target's positions to a draft that may have a shorter table.
    Change: places come from the lengths of the requests, positions stay inside the draft's table;
        a draft of text alone that numbers tokens itself begins with their places.
    Remove when: vLLM's older proposer keeps places and 3-D positions apart, as the newer runner
        does.
    """
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer  # noqa: PLC0415  (slow)

    first, further = (
        SpecDecodeBaseProposer.set_inputs_first_pass,
        SpecDecodeBaseProposer._update_positions_dependent_metadata,
    )
    if hasattr(first, "of_vllm"):
        return

    @wraps(first)
    def set_inputs_first_pass(self: Any, **given: Any) -> Any:
        positions = given["target_positions"]
        if positions.ndim == 2:
            if self.needs_extra_input_slots:
                positions = places(given["cad"], positions.shape[1]).to(positions)
            else:
                positions = positions.clamp(max=_rows(self) - 1)
            given["target_positions"] = positions
        return first(self, **given)

    @wraps(further)
    def update(
        self: Any, positions: torch.Tensor, metadata: Any, batch: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if not self.vllm_config.model_config.uses_mrope or self.needs_extra_input_slots:
            return further(self, positions, metadata, batch, *args, **kwargs)
        after = (positions + 1).clamp(max=_rows(self) - 1)  # before the buffer is written to
        last = (metadata.seq_lens[:batch] - 1).to(positions).expand_as(positions).contiguous()
        moved = further(self, last, metadata, batch, *args, **kwargs)
        # vLLM's place behind the longest prompt is 0 and has no slot: its draft is worth nothing.
        return moved.copy_(torch.where(moved > 0, after, 0))

    set_inputs_first_pass.of_vllm = first  # type: ignore[attr-defined]
    SpecDecodeBaseProposer.set_inputs_first_pass = set_inputs_first_pass
    SpecDecodeBaseProposer._update_positions_dependent_metadata = update


def places(metadata: Any, count: int) -> torch.Tensor:
    """Places in their prompts of the tokens of a step, (count,) int64, by vLLM's metadata of it."""
    starts = metadata.query_start_loc
    lengths = starts[1:] - starts[:-1]
    first = metadata.seq_lens[: len(lengths)] - lengths - starts[:-1]
    moved = torch.repeat_interleave(first, lengths, output_size=count)
    return moved + torch.arange(count, device=moved.device)


def _rows(proposer: Any) -> int:
    """Rows of the table of rotary embeddings that a draft has."""
    config = proposer.draft_model_config
    rows = rotary_rows(config.hf_config)
    return rows if config.uses_mrope else rows // TABLE_FACTOR
