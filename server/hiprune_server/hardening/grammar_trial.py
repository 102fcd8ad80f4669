"""The process in which a grammar is tried before it meets the server (see `grammars`).

Symptom: what makes a grammar takes minutes or all memory, and no thread of a server can be stopped.
Cause: vLLM makes it by libraries in C++ that know no limits.
Change: it is made here first, under the system's limits for a process.
Remove when: vLLM bounds what a grammar costs.

Reads frames from its standard input, writes answers to its standard output; a frame is a pickle
with its length before it. First a vLLM configuration, then `SamplingParams`, one at a time; the
answer to each is one of `OUTCOMES`. It ends when its input does.
"""

import os
import pickle
import resource
import signal
import struct
import sys
import time
from types import SimpleNamespace
from typing import Any, BinaryIO, Final

import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

LENGTH: Final = struct.Struct(">Q")
"""Of a frame."""
READY, FINE, COSTLY, LATE = OUTCOMES = ("ready", "fine", "costly", "late")
"""Said once the configuration is read; then, of a grammar: it was compiled or vLLM refuses it
within the limits; it took more of a processor, or of memory, or ended the process that tried it;
that process got no processor (nothing is known of the grammar)."""

CHECK_S: Final = 0.5
"""Seconds of a processor for vLLM's check of a grammar, which holds the server's event loop."""
MEMORY: Final = 2 << 30
"""Bytes that a grammar may need."""
PATIENCE: Final = 6
"""Seconds to wait for a second of a processor."""
_TICK_S: Final = 0.002


class Trial:
    """vLLM's own way of making a grammar, as the front end and the engine do it.

    Args:
        config: vLLM's, of the engine.
        seconds: of a processor that a grammar may take.
    """

    def __init__(self, config: Any, seconds: float) -> None:
        self._config, self._seconds = config, seconds
        self._manager = StructuredOutputManager(config)
        self._manager._use_async_grammar_compilation = False
        # What every grammar needs is made once, here, and is in no grammar's account.
        self._attempt(SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")))

    def of(self, params: SamplingParams) -> str:
        """Tries one, in a process of its own.

        Returns:
            `FINE`, `COSTLY` or `LATE`.
        """
        child = os.fork()
        if child == 0:
            self._in_child(params)
        deadline = time.monotonic() + PATIENCE * (CHECK_S + self._seconds)
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return FINE if os.waitstatus_to_exitcode(status) == 0 else COSTLY
            time.sleep(_TICK_S)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return LATE

    def _in_child(self, params: SamplingParams) -> None:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            most = _data_bytes() + MEMORY
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
            self._attempt(params, CHECK_S, self._seconds)
            status = 0
        except MemoryError:
            pass
        finally:
            os._exit(status)

    def _attempt(self, params: SamplingParams, check_s: float = 0, compile_s: float = 0) -> None:
        """Raises MemoryError alone; beyond a limit of time (0: none) the process ends."""
        manager, config = self._manager, self._config
        _limit(check_s)
        try:
            params._validate_structured_outputs(
                config.model_config, config.structured_outputs_config, manager.tokenizer
            )
            wanted = params.structured_outputs._backend
            if manager.backend is not None and wanted != "xgrammar":
                manager.backend = None  # `grammar_init` makes the one that is asked for
            _limit(compile_s)
            request: Any = SimpleNamespace(
                request_id="trial",
                sampling_params=params,
                structured_output_request=StructuredOutputRequest.from_sampling_params(params),
            )
            manager.grammar_init(request)
            grammar = request.structured_output_request.grammar
            if isinstance(grammar, MemoryError):
                raise grammar
            if not isinstance(grammar, Exception):
                words = -(-config.model_config.get_vocab_size() // 32)
                grammar.fill_bitmask(torch.zeros(1, words, dtype=torch.int32), 0)
        except MemoryError:
            raise
        except Exception:  # what vLLM says of it, it says as cheaply when the request comes
            return
        finally:
            _limit(0)


def _limit(seconds: float) -> None:
    """Ends this process once all its threads have used `seconds` of a processor from now."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA in this process by now, at most."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmData"].split()[0]) * 1024


def read(stream: BinaryIO) -> Any:
    """The next frame; raises EOFError where there is none."""
    length = stream.read(LENGTH.size)
    if len(length) < LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(*LENGTH.unpack(length)))


def frame(value: bytes) -> bytes:
    """A pickle as a frame."""
    return LENGTH.pack(len(value)) + value


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    trial = Trial(*read(sys.stdin.buffer))
    outcome = READY
    while True:
        answers.write(f"{outcome}\n".encode())
        answers.flush()
        try:
            params = read(sys.stdin.buffer)
        except EOFError:
            return
        outcome = trial.of(params)


if __name__ == "__main__":
    main()
