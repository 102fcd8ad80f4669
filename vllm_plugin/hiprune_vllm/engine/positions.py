"""3-D rotary positions of pruned images, whole or in chunks of any size, in any family.

Nothing here knows how a family numbers its pictures and videos: vLLM's own model is asked for the
positions of the prompt as it would be unpruned (`whole_prompt`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.multimodal.utils import copy_mm_embedding_modality
from vllm.sequence import IntermediateTensors
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from hiprune_vllm.engine.model import PrunedModel
from hiprune_vllm.engine.whole import dropped, whole_prompt
from hiprune_vllm.pruning.positions import decode_positions, no_positions

POSITIONS = "hiprune_positions"
"""Name of the tensor, (tokens, 3), by which a stage of a pipeline hands positions to the next."""


class PrunedMRopeModel(PrunedModel):
    """Mixin in front of a vLLM model with M-RoPE.

    Text positions are known before anything is encoded: text goes on where it would behind the
    whole image, pruned or not. Until a pruned image is encoded all its tokens have the image's
    first position, those of a video its slice's; with the embeddings come row and column of each
    token, and the slice's time. The temporal position stays: without the time it is the first one,
    which row and column are added to, so writing them twice, or a part of them, does no harm.

    In a pipeline the first stage alone has embeddings, so it sends the positions along with the
    hidden states, and the others take them instead of their own.
    """

    supports_multimodal_pruning = True
    """So that the runner lets positions come with embeddings; not every class of vLLM's says it."""

    visual: Any
    config: Any
    make_empty_intermediate_tensors: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.is_multimodal_pruning_enabled = False  # vLLM's own, of videos
        of_vllm = self.make_empty_intermediate_tensors

        def with_positions(
            batch_size: int, dtype: torch.dtype, device: torch.device
        ) -> IntermediateTensors:
            received = of_vllm(batch_size=batch_size, dtype=dtype, device=device)
            positions = torch.zeros(batch_size, 3, dtype=torch.int64, device=device)
            return IntermediateTensors(received.tensors | {POSITIONS: positions})

        self.make_empty_intermediate_tensors = with_positions

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """vLLM's own forward; in a pipeline with the first stage's positions.

        Args:
            positions: (3, tokens), this stage's own.
        """
        if intermediate_tensors is not None:
            received = dict(intermediate_tensors.tensors)
            # A view: captured graphs need the place in memory that they have seen.
            positions = received.pop(POSITIONS).t()
            intermediate_tensors = IntermediateTensors(received)
        result = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        if isinstance(result, IntermediateTensors):
            # Only what is contiguous can be sent.
            return IntermediateTensors(result.tensors | {POSITIONS: positions.t().contiguous()})
        return result

    def as_sent(self, items: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All of one width: those of pruned images bring positions, the others none."""
        width = self.visual.out_hidden_size
        return [
            item
            if item.shape[1] > width
            else torch.cat([item, no_positions(len(item), item)], dim=1)
            for item in super().as_sent(items)
        ]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions of the whole prompt, (3, tokens), and what decoding adds to its own count.

        They are vLLM's own for the prompt as it would be unpruned.
        """
        number: Any = super().get_mrope_input_positions  # type: ignore[misc]
        if not any(map(dropped, mm_features)):
            unpruned: tuple[torch.Tensor, int] = number(input_tokens, mm_features)
            return unpruned
        whole = whole_prompt(input_tokens, mm_features)
        positions, _ = number(whole.tokens, whole.media)
        positions = positions[:, torch.from_numpy(whole.places)]
        return positions, int(positions.max()) + 1 - len(input_tokens)

    def without_positions(self, embeddings: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the language model, or a draft of it, gets of pieces as `embed_multimodal` made."""
        width = self.visual.out_hidden_size
        return [copy_mm_embedding_modality(item, item[:, :width]) for item in embeddings]

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[torch.Tensor], torch.Tensor, int]:
        """Takes the positions off the embeddings of a prefill chunk and writes them.

        vLLM's older runner calls it for every request in every step, decoding ones too, which have
        no embeddings: the positions come back as they are.

        Args:
            input_ids: the whole prompt.
            multimodal_embeddings: the pieces that this chunk needs, in order, positions included.
            mrope_positions: (3, tokens) of the whole prompt.
            num_computed_tokens: where the chunk begins.
        """
        # No token has a later position than the last: it is text, behind everything else, or the
        # last patch of an unpruned item, in its last row and column. Nothing below changes it.
        if not multimodal_embeddings:
            return [], mrope_positions, _delta(mrope_positions)
        width = self.visual.out_hidden_size
        embeddings = self.without_positions(multimodal_embeddings)
        encoded = torch.cat([item[:, width:] for item in multimodal_embeddings])
        device = mrope_positions.device
        with gpu_sync_allowed():
            pruned, row, column, time = (x.to(device) for x in decode_positions(encoded))
            ids = torch.as_tensor(input_ids, device=device)[num_computed_tokens:]
            media = ids.eq(self.config.image_token_id) | ids.eq(self.config.video_token_id)
            # The chunk's embeddings are those of the next media tokens, one by one.
            where = media.nonzero().flatten()[: len(pruned)] + num_computed_tokens
            where = where[pruned]
            mrope_positions = mrope_positions.clone()
            first = mrope_positions[0, where] - time[pruned]
            mrope_positions[1, where] = first + row[pruned]
            mrope_positions[2, where] = first + column[pruned]
            return embeddings, mrope_positions, _delta(mrope_positions)


def _delta(positions: torch.Tensor) -> int:
    """What decoding adds to its own count, by the positions, (3, tokens), of a whole prompt."""
    return max(positions[:, -1].tolist()) + 1 - positions.shape[1]
