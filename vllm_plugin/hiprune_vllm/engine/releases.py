"""Which vLLM this plugin serves. Imports nothing of it: it is asked under any release."""

from typing import Final

from hiprune_vllm import tuning

OLDEST: Final = (0, 32)
BELOW: Final = (0, 34)


def is_tested(version: str) -> bool:
    """Whether a release's hooks were tested: it is in [OLDEST, BELOW)."""
    parts = version.split(".")
    try:
        return OLDEST <= (int(parts[0]), int(parts[1])) < BELOW
    except (IndexError, ValueError):
        return False


def is_served(version: str) -> bool:
    """Whether a release was tested, or the operator wants any (`HIPRUNE_ANY_VLLM=1`)."""
    return is_tested(version) or tuning.on(tuning.ANY_VLLM)


def check_version(version: str) -> None:
    """Refuses a vLLM whose hooks were not tested, unless the operator wants any.

    Raises:
        RuntimeError: naming what was tested, and what to do.
    """
    if not is_served(version):
        wanted = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, BELOW))}"
        raise RuntimeError(
            f"hiprune-vllm was tested with vllm {wanted}, found {version}. Install a tested "
            "release, or leave this plugin out by naming the others in VLLM_PLUGINS, or try it "
            f"with {tuning.ANY_VLLM}=1: answers may be wrong without a word."
        )
