"""A server that is told to stop stops: while its model loads, and with streams left open.

Symptom: SIGTERM while the model is loaded stops nothing; later, a stream that the stopped engine
    will never finish keeps the process for ever.
Cause: vLLM drops the interrupt around its wait for the engine; uvicorn waits for every stream.
Change: the interrupt ends the start, and uvicorn goes some seconds after the engine.
Remove when: vLLM lets the interrupt through, and ends its streams with its engine.
"""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from fastapi import FastAPI
from vllm.v1.engine import utils as engine_utils

LAST_CHUNKS_S: Final = 3
"""Seconds that finished streams have to reach their clients once the engine has stopped."""


def stop_in_good_order(app: FastAPI) -> threading.Event:
    """Lets the HTTP server go where streams are left that the stopped engine will never finish.

    uvicorn waits for them without end.

    Returns:
        An event that is set once the engine is asked to stop, rather than dead.
    """
    state = app.state  # vLLM takes it off the app before it stops an engine that has died
    engine, loop, asked = state.engine_client, asyncio.get_running_loop(), threading.Event()
    stop = engine.shutdown

    def shutdown(*args: Any, **kwargs: Any) -> None:  # called in a thread; returns when drained
        asked.set()
        try:
            stop(*args, **kwargs)
        finally:
            loop.call_soon_threadsafe(
                loop.call_later, LAST_CHUNKS_S, setattr, state.server, "force_exit", True
            )

    engine.shutdown = shutdown
    return asked


def let_a_start_be_stopped() -> None:
    """Makes SIGTERM end a server that still loads its model.

    Symptom: SIGTERM while the model is loaded stops nothing, and the server waits for its engine
        until it is killed.
    Cause: `zmq_socket_ctx`, around that wait, drops the KeyboardInterrupt that the signal raises.
    Change: it becomes SystemExit, which is not dropped, with the status that SIGTERM leaves.
    Remove when: vLLM lets the interrupt through.
    """
    original = engine_utils.zmq_socket_ctx

    @contextmanager
    def interruptible(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with original(*args, **kwargs) as socket:
            try:
                yield socket
            except KeyboardInterrupt:
                raise SystemExit(128 + signal.SIGTERM) from None

    engine_utils.zmq_socket_ctx = interruptible
