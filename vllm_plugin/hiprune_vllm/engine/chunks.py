"""Pictures that vLLM has among items of another kind, `vision_chunk` (Kimi K2.5)."""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers import hf


def let_pictures_have_names() -> None:
    """Lets a client name some of its pictures (`uuid`), or send a name alone.

    Symptom: a 400 about lengths where one of two pictures has a name; an "Internal server error"
        where a picture comes by its name alone, or where a video cannot be cut.
    Cause: vLLM collects the names anew, from items that may have none or be none; it cuts videos
        where the model's processor can (`split_video_chunks`), and passes them on whole otherwise.
    Change: names that belong to pictures stay as they were read; a video that was not cut is
        refused by name.
    Remove when: `rebuild_mm_uuids_from_mm_data` keeps a place for each item.
    """
    if hasattr(hf.rebuild_mm_uuids_from_mm_data, "__wrapped__"):
        return
    rebuild, prompts = hf.rebuild_mm_uuids_from_mm_data, hf.build_video_prompts_from_mm_data

    @wraps(rebuild)
    def rebuilt(mm_uuids: Any, mm_data: Mapping[str, Any]) -> Any:
        items = mm_data.get("vision_chunk")
        if items is None:
            return mm_uuids
        if not all(item is None or isinstance(item, dict) for item in items):
            raise VLLMValidationError(
                "video_url must be left out: videos are not served with this model",
                parameter="video_url",
            )
        cut = any(item is not None and item["type"] != "image" for item in items)
        return rebuild(mm_uuids, mm_data) if cut else mm_uuids

    @wraps(prompts)
    def of_videos(mm_data: Mapping[str, Any]) -> list[str]:
        items = [item for item in mm_data.get("vision_chunk") or () if item is not None]
        found: list[str] = prompts({"vision_chunk": items})
        return found

    hf.rebuild_mm_uuids_from_mm_data = rebuilt
    hf.build_video_prompts_from_mm_data = of_videos
