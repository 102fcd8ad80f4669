"""The server's secret: keys what a client must not be able to compute or to guess.

Made once, before there are other processes: all of one server inherit it, so that a picture which
several API servers have prepared is one picture to the worker. It is nowhere shown.
"""

import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Sequence
from typing import Final

VARIABLE: Final = "PRUNING_SECRET"
"""Environment variable that holds it; one that the operator has set stays."""
_WORDS: Final = struct.Struct("<4q")


def share() -> None:
    """Makes the secret where this process and its parents have none; children inherit it."""
    os.environ.setdefault(VARIABLE, secrets.token_hex(32))


def keyed(identity: str, numbers: Sequence[int]) -> tuple[int, ...]:
    """The whole keyed digest (HMAC-SHA-256) of an image's identity and its numbers.

    Args:
        identity: the image's identity in vLLM's caches, a text.
        numbers: integers that belong to it.

    Returns:
        Four integers in [-2**63, 2**63).
    """
    share()
    told = f"{identity} {','.join(map(str, numbers))}"
    key = os.environ[VARIABLE].encode()
    return _WORDS.unpack(hmac.digest(key, told.encode(), hashlib.sha256))
