"""Lets vLLM's workers be Ray's on the CPU engine, where a process has this folder on its path.

vLLM asks Ray for accelerators by a name that its CPU platform has not. Here it has the one of GPUs,
of which Ray believes what it is told (`ray start --num-gpus`).
"""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"


def platform() -> str:
    """Entry point of `vllm.platform_plugins`."""
    return f"{__name__}.{RayCpuPlatform.__name__}"
