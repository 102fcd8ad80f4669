"""Lines on the terminal that show how far a sweep is."""

import sys
import time
from collections.abc import Sequence

from loadtests.load.records import NOT_ERRORS, OK, Record
from loadtests.load.running import Run
from loadtests.load.summary import percentile, values

_START_S = 4
"""What a cell takes besides its warm-up and window: the load generator's start and end."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Progress:
    """One line that is written over on a terminal, a line every few seconds elsewhere.

    Args:
        cells: how many there are.
        seconds: how long each is expected to take.
    """

    def __init__(self, cells: int = 1, seconds: float = 0.0) -> None:
        self._cells, self._each = cells, seconds + _START_S
        self._terminal = sys.stderr.isatty()
        self._every = 0.5 if self._terminal else 5.0
        self._shown = 0.0
        self._began = time.monotonic()
        self._head, self._number = "", 0

    def begin(self, number: int, name: str) -> None:
        self._number, self._head = number, f"cell {number} of {self._cells}  {name:>12}"

    def show(self, text: str, *, last: bool = False) -> None:
        """Shows `text` unless another line was shown just now; `last` is always shown."""
        now = time.monotonic()
        if not last and now - self._shown < self._every:
            return
        self._shown = now
        if self._terminal:
            sys.stderr.write(f"\r\033[K{text}" + ("\n" if last else ""))
            sys.stderr.flush()
        else:
            say(text)

    def phase(self, phase: str, passed: float, records: Sequence[Record]) -> None:
        """Hears of a cell under way."""
        done = self._number - 1
        if done:
            self._each = max(self._each, (time.monotonic() - self._began) / (done + 1))
        left = max(0.0, self._each * (self._cells - done) - passed) / 60
        self.show(
            f"{self._head}  {phase} {passed:3.0f} s  {_state(records)}  about {left:.0f} min left"
        )

    def end(self, run: Run) -> None:
        """Hears of a cell that is done."""
        trouble = f"  !! {run.trouble}" if run.trouble else ""
        self.show(f"{self._head}  done  {_state(run.records)}{trouble}", last=True)


def _state(records: Sequence[Record]) -> str:
    good = [record for record in records if record.outcome == OK]
    failed = sum(record.outcome not in NOT_ERRORS for record in records)
    ttft = percentile(values(good, "ttft"), 50)
    told = f"{len(good):4d} answers"
    if ttft is not None:
        told += f"  first token {1000 * ttft:.0f} ms"
    return told + (f"  {failed} failed" if failed else "")
