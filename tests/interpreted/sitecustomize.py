"""Lets vLLM's Triton kernels run on the CPU, in every process that has this folder on its path.

vLLM uses Triton on a CPU where it has a back end for it, which the registry's build has not. With
`TRITON_INTERPRET=1` kernels run in Python and need none: to be there is all that it has to do.
"""

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends.setdefault("cpu", SimpleNamespace(driver=driver, compiler=None))
