"""Which vLLM this plugin was tested with. Imports nothing: it is asked under any other, too."""

from typing import Final

OLDEST: Final = (0, 32)
BELOW: Final = (0, 34)


def is_tested(version: str) -> bool:
    """Whether a release's hooks were tested: it is in [OLDEST, BELOW)."""
    parts = version.split(".")
    try:
        return OLDEST <= (int(parts[0]), int(parts[1])) < BELOW
    except (IndexError, ValueError):
        return False


def check_version(version: str) -> None:
    """Refuses a vLLM whose hooks were not tested.

    Raises:
        RuntimeError: naming what was tested, and what to do.
    """
    if not is_tested(version):
        wanted = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, BELOW))}"
        raise RuntimeError(
            f"hiprune-vllm was tested with vllm {wanted}, found {version}. Install a tested "
            "release, or leave this plugin out by naming the others in VLLM_PLUGINS."
        )
