"""The front end's side of 3-D rotary positions: prompts whose positions cannot be served."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails

from hiprune_vllm.engine.processing import PrunedProcessor
from hiprune_vllm.engine.rotary_table import rotary_rows
from hiprune_vllm.engine.whole import dropped, whole_prompt
from hiprune_vllm.plan import FIELD
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.positions import LARGEST

TEXT: Final = -1
"""Stands for a token of text, whichever."""


def last_end(prompt: int, media: Iterable[tuple[int, int]], longest: int) -> int:
    """The position behind the last one of a prompt with the longest answer that it may get.

    Text goes on behind the rows and columns of a medium's whole grid, so the positions of a pruned
    prompt are not bounded by its length.

    Args:
        prompt: tokens.
        media: tokens and positions that each medium takes.
        longest: tokens that prompt and answer may have together (`max_model_len`).
    """
    end = prompt + sum(positions - tokens for tokens, positions in media)
    return end + max(0, longest - prompt)


@dataclass
class _Placed(PromptUpdateDetails):
    """A medium's placeholder tokens, and how far the text behind it is moved on by it.

    vLLM keeps it with a cached medium, whose data is not at hand any more.
    """

    positions: int = 0


class PrunedMRopeProcessor(PrunedProcessor):
    """The mixin of families whose tokens have 3-D positions."""

    vllm_class: ClassVar[Any]
    """vLLM's model class, which numbers the tokens of a prompt."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=hf_processor_mm_kwargs,
            out_mm_kwargs=out_mm_kwargs,
        )
        return [self._placed(update, out_mm_kwargs) for update in updates]

    def _placed(self, update: PromptUpdate, out_mm_kwargs: Any) -> PromptUpdate:
        if not isinstance(update, PromptReplacement):
            raise RuntimeError(f"version drift: expected PromptReplacement, got {type(update)}")

        def replacement(index: int) -> PromptUpdateDetails:
            found = update.resolve(index).content
            data = out_mm_kwargs[update.modality][index]
            positions = self._positions(update.modality, data, found)
            return _Placed(found.full, found.is_embed, positions)

        return replace(update, replacement=replacement)

    def _positions(self, modality: str, data: Any, placed: PromptUpdateDetails) -> int:
        """Positions that a medium takes: the one that vLLM gives to text behind it.

        Raises:
            VLLMValidationError: more than those of kept tokens can travel with, as in a video whose
                file or request says that its frames are hours apart.
        """
        tokens = list(placed.full)
        mask = None if placed.is_embed is None else placed.is_embed(tokens)
        place = PlaceholderRange(0, len(tokens), mask)
        medium = MultiModalFeatureSpec(data, modality, identifier="", mm_position=place)
        whole = whole_prompt([*tokens, TEXT], [medium])
        # It is asked for positions alone, which need neither weights nor any other state.
        model = object.__new__(self.vllm_class)
        model.__dict__["config"] = self.info.get_hf_config()
        try:
            positions, _ = model.get_mrope_input_positions(whole.tokens, whole.media)
        except AssertionError as error:  # embeddings of a picture, whose grid is the client's
            raise VLLMValidationError(
                f"image_grid_thw must be of a picture of one frame ({error})",
                parameter="image_grid_thw",
            ) from error
        taken = int(positions[:, -1].max())
        if dropped(medium) and taken > LARGEST:
            raise VLLMValidationError(
                f"a {modality} that is pruned must not take more than {LARGEST} positions, got "
                f"{taken}: send a shorter one, or with more frames a second",
                parameter=f"{modality}_url",
            )
        return taken

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        prompt, places = super()._maybe_apply_prompt_updates(mm_items, mm_res)
        media = [
            (len(content.full), content.positions)
            for of_kind in mm_res.prompt_updates.values()
            for of_medium in of_kind
            for content in (update.content for update in of_medium)
        ]
        longest = self.info.ctx.model_config.max_model_len
        rows, end = rotary_rows(self.info.get_hf_config()), last_end(len(prompt), media, longest)
        if end > rows:
            raise VLLMValidationError(
                f"messages must not have that many or that long pictures and videos: with the "
                f"longest answer (--max-model-len {longest}) positions must stay below {rows}, "
                f"got {end - 1}; each picture counts max(rows, columns) of all its tokens, "
                "however few are kept",
                parameter="messages",
            )
        return prompt, places

    def _check(self, result: Any, budgets: Sequence[ImageBudget]) -> None:
        """Refuses prompts whose positions could not be told from the prompt alone.

        The worker finds pruned images by their placeholder tokens, and text that follows tells
        where decoding goes on.
        """
        if all(budget.is_full for budget in budgets):
            return
        config = self.info.ctx.model_config.hf_config
        media = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
        prompt, places = result["prompt_token_ids"], result["mm_placeholders"]
        expected = sum(place.get_num_embeds() for kind in places.values() for place in kind)
        if sum(token in media for token in prompt) != expected:
            raise VLLMValidationError(
                "the text must not contain the image or video placeholder token where an image "
                "is pruned",
                parameter=FIELD,
            )
        if prompt[-1] in media:
            raise VLLMValidationError(
                "text must follow a pruned image, the prompt ends with one", parameter=FIELD
            )
