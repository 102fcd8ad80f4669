"""How the worker computes, never what: settings for measuring, read from the environment here alone.

| variable | values | |
|---|---|---|
| `PRUNING_LAST_BLOCK` | `kept` (default), `whole` | whether the encoder's last block ends with the kept tokens only |
| `PRUNING_SCORE_KERNEL` | `torch` (default), `triton` | what adds up attention on a CUDA device; the second has not run on one yet |

And two switches, 1 or 0: `HIPRUNE_DISABLE`, with which there is no pruning at all, and
`HIPRUNE_ANY_VLLM`, with which releases of vLLM are served that were not tested.
"""  # noqa: E501

import os

CHOICES = {
    "PRUNING_LAST_BLOCK": ("kept", "whole"),
    "PRUNING_SCORE_KERNEL": ("torch", "triton"),
}

DISABLE = "HIPRUNE_DISABLE"
ANY_VLLM = "HIPRUNE_ANY_VLLM"


def on(switch: str) -> bool:
    """Whether a switch says 1 (true); 0 (false) or unset is off.

    Raises:
        ValueError: the variable says neither.
    """
    value = os.environ.get(switch, "")
    if value.lower() not in ("", "0", "false", "1", "true"):
        raise ValueError(f"{switch} must be 1 or 0, got {value!r}")
    return value.lower() in ("1", "true")


def chosen(name: str) -> str:
    """The value of one setting, the first of `CHOICES` by default.

    Raises:
        ValueError: it has another value.
    """
    choices = CHOICES[name]
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check() -> None:
    """Raises a ValueError where any setting is wrong."""
    for name in CHOICES:
        chosen(name)
