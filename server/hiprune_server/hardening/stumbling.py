"""Whose fault it is where vLLM's code stumbles over a request: its sender's, or the server's.

Symptom: a request of an odd shape is a 500 with a traceback, or trouble of the server's own is a
    400, as if its client had asked wrongly.
Cause: vLLM looks into a request before it has checked all of its shape, and its handlers take some
    errors of Python's, such as TypeError, for the client's fault.
Change: what fails while messages are read is a 400 that names the field; what fails later is a
    500 and logged, but for vLLM's own refusals.
Remove when: vLLM checks the shape of messages, and answers 400 for its own refusals alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from vllm.exceptions import VLLMError, VLLMServerError, VLLMValidationError
from vllm.logger import init_logger

from hiprune_server.hardening.shape import tensors_in
from hiprune_server.operations import metrics
from hiprune_vllm.plan import PlanError

logger = init_logger(__name__)


def refused(error: PlanError) -> VLLMValidationError:
    """A `hiprune` object that cannot be served, as vLLM's handlers tell it; counts it."""
    metrics.count_rejected(error)
    refusal = VLLMValidationError(str(error), parameter=error.field)
    refusal.__cause__ = error
    return refusal


STUMBLES: Final = (
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    RecursionError,
)
"""What vLLM's code raises where a request has not the shape that it takes for granted."""


@contextmanager
def blamed_on_the_request(field: str) -> Iterator[None]:
    """Makes a 400 of what vLLM stumbles over while it turns a request into chat messages.

    It looks into them before it has checked all of their shape; nothing but the request itself
    is at hand there. What goes wrong later has names of its own, see `named`.
    """
    try:
        yield
    except STUMBLES as error:
        raise VLLMValidationError(
            f"{field} must be messages as the API has them, these cannot be read", parameter=field
        ) from error


class ServerTrouble(VLLMServerError):
    """Something went wrong that is not known to be the request's fault: HTTP 500."""


@contextmanager
def named(messages: Sequence[Any]) -> Iterator[None]:
    """Lets refusals pass and makes all else the server's trouble, which is logged.

    vLLM's handlers take some errors of Python's, such as TypeError, for the client's fault. Tensors
    are the exception: vLLM looks at those that a client sends no further than it stumbles.
    """
    try:
        yield
    except VLLMError:
        raise
    except Exception as error:
        tensors = tensors_in(messages)
        if tensors is not None:
            raise VLLMValidationError(
                f"{tensors} must be such as this model takes, these cannot be read",
                parameter=tensors,
            ) from error
        if isinstance(error, ValueError | NotImplementedError):  # vLLM's words for a client
            raise
        logger.exception("A request could not be rendered.")
        raise ServerTrouble("Internal server error") from error
