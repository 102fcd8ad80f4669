"""Forms of answers that clients ask for are tried apart before the engine makes them.

Symptom: one request (`structured_outputs`, `response_format`, `text`, `tools`) keeps the processors
    of a host busy for minutes, holds the event loop, or fills the memory; other clients wait.
Cause: vLLM checks a grammar in the server's event loop and compiles it in threads of the engine's
    process, for as long as both take; its limit for regular expressions leaves the thread running.
Change: a grammar that this process has not seen is first made in a process of its own, under
    limits of processor time and memory, one at a time. What exceeds them is a 400.
Remove when: vLLM bounds what a grammar costs.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator
from http import HTTPStatus
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import init_logger

from hiprune_server.operations.metrics import OVERLOAD, REJECTED

logger = init_logger(f"vllm.{__name__}")  # as its own: else nobody sees it

MOST_WAITING: Final = 16
"""Grammars that wait to be tried; a request with one more is a 503."""
MOST_KNOWN: Final = 4096
"""Grammars whose outcome is remembered."""
FIELDS: Final = ("structured_outputs", "response_format", "text", "output_config", "tools")
"""Of requests: where the form of an answer is asked for."""
START_S: Final = 120
"""Seconds that the process that tries may need for its start."""
ANSWER_S: Final = 10
"""Seconds that an answer may need for each second of a processor that a grammar may take."""
_PROCESS: Final = (sys.executable, "-m", "hiprune_server.hardening.grammar_trial")


def form_field(request: Any) -> str:
    """The field of a request that asks for a form of the answer."""
    given = (name for name in FIELDS if getattr(request, name, None))
    return next(given, FIELDS[0])


def unanswerable(field: str) -> VLLMValidationError:
    """The refusal of a form that the model's vocabulary has no words for, or that is none."""
    return VLLMValidationError(
        f"{field} must be a form that this model can answer in, "
        "got one that ended the answer with an error",
        parameter=field,
    )


class Grammars:
    """Which forms of answers the engine may be asked for; one for each API server process.

    Args:
        config: vLLM's.
        seconds: of a processor that making one may take (`limits.grammar_seconds`).
    """

    def __init__(self, config: Any, seconds: float) -> None:
        self._config, self._seconds = config, seconds
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._underway: dict[bytes, asyncio.Task[str]] = {}
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def check(self, params: Any, field: str = FIELDS[0]) -> None:
        """Waits until the grammar of a request is known to be cheap enough.

        Args:
            params: vLLM's SamplingParams, or those of another kind, which have no grammar.
            field: of the request, named in a refusal.

        Raises:
            VLLMValidationError: it costs more than the limits.
            GracefulHTTPError: too many wait (503).
        """
        form = getattr(params, "structured_outputs", None)
        if form is None or form.all_constraints_none():
            return
        asked = dataclasses.asdict(form)
        key = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).digest()
        outcome = self._known.get(key)
        if outcome is None:
            outcome = await self._tried(key, params)
        if outcome == "costly":
            raise VLLMValidationError(
                f"{field} must be a form of answer that takes at most {self._seconds:g} s of a "
                "processor (limits.grammar_seconds) and 2 GiB to prepare, got one that takes more",
                parameter=field,
            )
        if outcome != "fine":
            REJECTED.labels(OVERLOAD).inc()
            told = "The server is too busy to prepare this form of answer. Please try again later."
            raise GracefulHTTPError(told, HTTPStatus.SERVICE_UNAVAILABLE)

    async def generate(
        self, vllms: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """`vllms`, an engine client's `generate`, once the grammar is known to be cheap enough.

        Requests of routes that do not come through our renderer meet their check here, and such a
        one that its grammar ends is told so: vLLM has "Internal server error".
        """
        await self.check(sampling_params)
        form = getattr(sampling_params, "structured_outputs", None)
        text = not (isinstance(prompt, dict) and prompt.get("mm_kwargs"))
        outputs = vllms(prompt, sampling_params, *args, **kwargs)
        try:
            async for output in outputs:
                if form and text and any(one.finish_reason == "error" for one in output.outputs):
                    raise unanswerable(FIELDS[0])
                yield output
        finally:
            await outputs.aclose()

    async def _tried(self, key: bytes, params: Any) -> str:
        task = self._underway.get(key)
        if task is None:
            if len(self._underway) >= MOST_WAITING:
                return "late"
            task = self._underway[key] = asyncio.create_task(self._try(key, params.clone()))
        return await asyncio.shield(task)  # another client may wait for it, too

    async def _try(self, key: bytes, params: Any) -> str:
        try:
            async with self._turn:
                try:
                    async with asyncio.timeout(START_S + ANSWER_S * self._seconds):
                        outcome = await self._ask(params)
                except (OSError, EOFError, TimeoutError) as error:
                    logger.error("The process that tries grammars gives no answer: %r", error)
                    self._end()
                    return "late"
        finally:
            del self._underway[key]
        if outcome in ("fine", "costly"):
            self._known[key] = outcome
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return outcome

    def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    async def _ask(self, params: Any) -> str:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *_PROCESS,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # a terminal's Ctrl-C is the server's; this ends after it
            )
            await self._exchange((self._config, self._seconds))
        return await self._exchange(params)

    async def _exchange(self, value: Any) -> str:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        pickled = bytes(ForkingPickler.dumps(value))  # as vLLM sends it to its own processes
        process.stdin.write(len(pickled).to_bytes(8, "big") + pickled)
        await process.stdin.drain()
        return (await process.stdout.readuntil(b"\n")).decode().strip()
