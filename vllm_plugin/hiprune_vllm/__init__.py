"""HiPrune visual-token pruning as a vLLM plugin.

Importing this package costs nothing: neither torch nor vLLM is loaded before `register` runs.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of `vllm.general_plugins`; vLLM calls it once in every process.

    Does nothing where pruning is switched off (`HIPRUNE_DISABLE=1`): vLLM serves as it is.
    """
    from hiprune_vllm import tuning

    if tuning.on(tuning.DISABLE):
        return
    from hiprune_vllm.engine.registration import register_models

    register_models()
