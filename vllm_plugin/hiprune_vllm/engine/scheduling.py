"""How many pictures one engine step encodes: the tower works on all tokens, kept or not."""

from typing import Any, Final

from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

MODALITIES: Final = ("image", "vision_chunk", "video")
"""What vLLM calls items that may be pruned (`FamilyAdapter.modality`, and videos)."""
_MARK: Final = "-whole-"


def with_size(digest: str, full: int) -> str:
    """An image's identity that also says how many tokens it has before pruning.

    The identity is all that the scheduler has of an image in every layout: the image's data may lie
    in shared memory that workers alone read.
    """
    return f"{digest}{_MARK}{full}"


def tokens_encoded(feature: MultiModalFeatureSpec) -> int:
    """Tokens that the vision tower works on: of the whole image, never fewer than are kept."""
    kept = feature.mm_position.get_num_embeds()
    _, mark, size = feature.identifier.rpartition(_MARK)
    # What is never pruned has an identity of vLLM's, or the `uuid` that its client has chosen.
    told = mark and feature.modality in MODALITIES and size.isascii() and size.isdigit()
    return max(kept, int(size[:18])) if told else kept


class WholeImageBudget(EncoderCacheManager):
    """vLLM's account of encoder outputs, which spends a step's encoder budget by whole images.

    Memory is charged as ever, by the tokens that are kept: only these are stored.

    An image with more tokens than the budget is encoded in a step of its own. One that is loaded
    from elsewhere (`--ec-transfer-config`) is charged as if it were encoded.

    Args:
        cache_size: of vLLM's cache, in kept tokens.
        lookahead: tokens beyond a step's own that a draft model sees.
    """

    def __init__(self, cache_size: int, lookahead: int = 0) -> None:
        super().__init__(cache_size)
        self._lookahead = lookahead
        self._budget = 0
        self._left: int | None = None  # None before the first image of a step
        # The request that the scheduler is looking at: what its images would cost, and where the
        # first of them ends. They are charged once the request has a place in the step.
        self._asked = 0
        self._reach = 0

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: VllmConfig) -> "WholeImageBudget":
        return cls(cache_size, vllm_config.num_prefill_lookahead_tokens)

    def can_allocate(
        self,
        request: Request,
        input_id: int,
        encoder_compute_budget: int,
        num_embeds_to_schedule: int,
    ) -> bool:
        """vLLM's own answer, and whether the step has the work left.

        Args:
            encoder_compute_budget: what vLLM's own count, by kept tokens, has left of the step's
                budget; all of it for the first image of a step.
            num_embeds_to_schedule: kept tokens of this request's images before; 0 for the first.
        """
        if self._left is None:
            self._left = self._budget = encoder_compute_budget
        feature = request.mm_features[input_id]
        start = feature.mm_position.offset
        first = num_embeds_to_schedule == 0
        asked = self._cost(feature) + (0 if first else self._asked)
        # vLLM stops `lookahead` tokens before an image that it may not encode. Where that leaves
        # nothing to compute the request would never go on, so such an image comes along.
        along = not first and start < self._reach + self._lookahead
        if asked > self._left and not along:
            return False
        if not super().can_allocate(
            request, input_id, encoder_compute_budget, num_embeds_to_schedule
        ):
            return False
        self._asked = asked
        if first:
            self._reach = start + feature.mm_position.length
        return True

    def allocate(self, request: Request, input_id: int) -> None:
        super().allocate(request, input_id)
        assert self._left is not None  # `can_allocate` comes first
        self._left -= self._cost(request.mm_features[input_id])

    def get_freed_mm_hashes(self) -> list[str]:
        """vLLM asks once, at the end of a step's schedule."""
        self._left = None
        return super().get_freed_mm_hashes()

    def _cost(self, feature: Any) -> int:
        return min(tokens_encoded(feature), self._budget)
