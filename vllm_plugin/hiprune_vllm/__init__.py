"""HiPrune visual-token pruning as a vLLM plugin.

Importing this package costs nothing: neither torch nor vLLM is loaded before `register` runs.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of `vllm.general_plugins`; vLLM calls it once in every process.

    Where pruning is switched off (`HIPRUNE_DISABLE=1`) vLLM serves as it is, but that a request
    with a budget is refused.
    """
    from hiprune_vllm import tuning
    from hiprune_vllm.engine import patches
    from hiprune_vllm.engine.registration import CLASSES, register_models

    pruning = not tuning.on(tuning.DISABLE)
    if pruning:
        register_models()
    patches.in_every_process(CLASSES if pruning else ())
