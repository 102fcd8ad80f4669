"""What this plugin changes in vLLM, and when: nothing else of it changes vLLM.

Each function that is called here says symptom, cause, change and "remove when" where it stands.
vLLM runs plugins in every process, asks for a model's class in those that serve it, and makes a
model in its workers: three moments, and each change comes at the first that needs it, since it
costs the import of what it changes. All are idempotent.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hiprune_vllm.engine.releases import is_served

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hiprune_vllm.models.base import FamilyAdapter


def in_every_process(architectures: Iterable[str]) -> None:
    """When vLLM runs its plugins, on releases that were tested.

    Args:
        architectures: of the models that are pruned; none where pruning is switched off.
    """
    import vllm

    if not is_served(vllm.__version__):
        return
    from hiprune_vllm.engine.compat import charge_whole_images
    from hiprune_vllm.engine.plain import load_our_routes

    load_our_routes()
    charge_whole_images(architectures)


def where_a_class_is_asked_for(family: "FamilyAdapter") -> None:
    """When vLLM looks for the class of a checkpoint: to process pictures, or to make a runner."""
    from hiprune_vllm.engine.chunks import let_pictures_have_names
    from hiprune_vllm.engine.compat import let_cpu_runner_ask, let_cpu_runner_receive

    let_cpu_runner_receive()
    if family.mrope:
        let_cpu_runner_ask()
    if family.modality != "image":
        let_pictures_have_names()


def where_a_model_is_made(vllm_config: "VllmConfig", family: "FamilyAdapter") -> None:
    """Before a model's layers are made, for the engine that the configuration is of.

    Raises:
        ValueError: vLLM's own video pruning is on beside 3-D positions.
    """
    from hiprune_vllm.engine.compat import (
        carry_positions_with_embeddings,
        forget_with_caches,
        keep_adapters_to_their_requests,
        keep_pruned_images_out_of_graphs,
        recompute_positions_where_needed,
    )
    from hiprune_vllm.engine.drafts import tell_places_from_positions

    forget_with_caches()
    if vllm_config.lora_config is not None:
        keep_adapters_to_their_requests()
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        keep_pruned_images_out_of_graphs()
    if family.mrope:
        # Some layers make a longer table of rotary embeddings for it.
        carry_positions_with_embeddings(vllm_config)
        recompute_positions_where_needed()
        if vllm_config.speculative_config is not None:
            tell_places_from_positions()
