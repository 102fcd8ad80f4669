"""vLLM's search for the kernels that a CPU has others for, kept from a stumble."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kernels_found() -> Iterator[None]:
    """Around what registers the kernels of a CPU.

    vLLM looks for them in all objects of all modules and stumbles over one of llvmlite's, which
    numba brings and vLLM's processor of Kimi K2.5 is written with.
    """
    from vllm.triton_utils import dispatcher

    rebind, name = dispatcher._rebind_kernels, "llvmlite.binding.ffi"

    def without_it(overrides: Any) -> None:
        module = sys.modules.pop(name, None)
        try:
            rebind(overrides)
        finally:
            if module is not None:
                sys.modules[name] = module

    dispatcher._rebind_kernels = without_it
    try:
        yield
    finally:
        dispatcher._rebind_kernels = rebind
