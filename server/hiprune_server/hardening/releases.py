"""What vLLM's supported releases have in different places, or not at all.

Symptom: the server does not start on one of the releases that are served.
Cause: vLLM moves what is not its public interface between minor releases.
Change: each such name is imported here from where it is, by trying, not by version number.
Remove when: 0.32 is no longer served.

Imports vLLM, which reads its environment then: to be imported once that is complete.
"""

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.entrypoints.common.startup import cli_env_setup
except ModuleNotFoundError:  # 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

try:
    from vllm.connections import MediaRequestDownloadSizeExceededError
except ImportError:  # 0.32

    class MediaRequestDownloadSizeExceededError(ValueError):  # type: ignore[no-redef]
        """What a request names is too much together; nothing raises it here."""


__all__ = ["MediaRequestDownloadSizeExceededError", "cli_env_setup", "make_arg_parser"]
