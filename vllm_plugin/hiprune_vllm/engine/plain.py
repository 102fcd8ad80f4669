"""Under vLLM's own server: no `hiprune` field of a request is ignored."""

import logging
from collections.abc import Sequence
from functools import wraps
from importlib.metadata import entry_points
from typing import Final

from vllm import envs, plugins
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.tasks import SupportedTask

GROUP: Final = "vllm.endpoint_plugins"
NAME: Final = "hiprune_api"

logger = logging.getLogger("vllm.hiprune")


def load_our_routes() -> None:
    """Patches vLLM. Idempotent; changes nothing where `hiprune-serve` has named our routes.

    Symptom: `vllm serve` with this plugin answers a request with a `hiprune` field as if it were
        without one.
    Cause: it loads HTTP routes of plugins only where VLLM_PLUGINS names them, and drops fields
        that it does not know.
    Change: where that variable is unset our routes are loaded too. Where it names others, a
        stand-in refuses every budget (400), and the start says so. Routes of other plugins stay as
        vLLM's rule has them.
    Remove when: vLLM loads such plugins by itself, or refuses fields that it does not know.
    """
    original = plugins.load_endpoint_plugins
    if hasattr(original, "of_vllm"):
        return

    @wraps(original)
    def load(supported_tasks: tuple[SupportedTask, ...] | None = None) -> list[EndpointPlugin]:
        found = original(supported_tasks)
        if any(plugin.name == NAME for plugin in found):
            return found
        return [*found, _ours(supported_tasks)]

    load.of_vllm = original  # type: ignore[attr-defined]
    plugins.load_endpoint_plugins = load


def _ours(tasks: Sequence[SupportedTask] | None) -> EndpointPlugin:
    """Our routes, or what stands in for them. Raises what keeps them from being loaded."""
    point = next(iter(entry_points(group=GROUP, name=NAME)))
    plugin = point.load()()
    allowed = envs.VLLM_PLUGINS
    if allowed is not None and NAME not in allowed:
        logger.warning(
            "VLLM_PLUGINS=%s leaves out %s, which reads `hiprune` of a request: each is refused "
            "(400). Name it as well, or unset the variable.",
            ",".join(allowed),
            NAME,
        )
        return plugin.refusing(f"VLLM_PLUGINS names no {NAME}")
    if not set(plugin.required_tasks) & set(tasks or ()):
        return plugin.refusing("this server makes no text and no embeddings")
    logger.info("Loaded endpoint plugin %s. To leave it out: VLLM_PLUGINS=hiprune", NAME)
    return plugin
