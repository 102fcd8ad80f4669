"""What is written down about each request."""

from dataclasses import dataclass, field
from typing import Final

OK: Final = "ok"
CANCELLED: Final = "cancelled"
SLOW: Final = "slow"
NOT_ERRORS: Final = (OK, CANCELLED, SLOW)
REFUSED: Final = "connection refused"
LOST: Final = "connection lost"
CUT: Final = "stream cut off"
TIMEOUT: Final = "timeout"
IN_STREAM: Final = "error in the stream"
UNREADABLE: Final = "unreadable answer"
NO_REPORT: Final = "no hiprune report"
UNSENT: Final = "not sent: too many under way"
UNANSWERED: Final = "no answer"
"""Still under way at the end of the window, for longer than any that ended by far."""


@dataclass
class Record:
    """What one request showed. Times are seconds; `started` and `ended` on the monotonic clock.

    Attributes:
        picture: its number.
        outcome: `ok`, `cancelled`, `slow` or the kind of error.
        detail: what the server said about an error.
        ttft: from the start to the first token.
        gaps: between one token's arrival and the next one's.
        full, kept: visual tokens as the server reported them.
        prompt, answer: tokens as the server counted them.
        queue, prefill, decode: the engine's own times for this request; None where the server does
            not tell (`--enable-per-request-metrics`).
        cached: prompt tokens from the prefix cache; None where the server does not tell.
    """

    picture: int
    started: float
    ended: float = 0.0
    outcome: str = OK
    detail: str = ""
    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)
    full: int | None = None
    kept: int | None = None
    prompt: int | None = None
    answer: int | None = None
    queue: float | None = None
    prefill: float | None = None
    decode: float | None = None
    cached: int | None = None

    @property
    def seconds(self) -> float:
        """From the start to the end."""
        return self.ended - self.started
