"""What every stage of the training shares: progress on the terminal, checkpoints, prefetching."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

SEED = 20250801
_TELL_EVERY = 10  # steps

T = TypeVar("T")


class Progress:
    """One line on the terminal, a log, and a checkpoint a minute.

    Args:
        folder: where checkpoints and the log are kept.
        stages: names of all stages with their expected share of the time, for the time left.
        save_every_s: seconds between checkpoints, at least.
    """

    def __init__(
        self, folder: Path, stages: dict[str, float], *, save_every_s: float = 60.0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._stages = stages
        self._save_every_s = save_every_s
        self._stage = ""
        self._done: list[float] = []
        self._began = self._saved = 0.0
        self._first = 0
        self._before: dict[str, float] = {}

    def resume(self, stage: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Loads what an interrupted run has left of a stage; returns the next step's number."""
        path = self._folder / f"{stage}.pt"
        if not path.is_file():
            return 0
        state = torch.load(path, weights_only=True)
        self._before[stage] = float(state["seconds"])
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def start(self, stage: str, work: Sequence[float], first: int) -> None:
        """Begins to show a stage of `len(work)` steps, with the cost of each in any unit."""
        if self._stage:
            self._before[self._stage] = self.seconds()
        self._stage, self._first = stage, first
        self._done = [0.0]
        for one in work:
            self._done.append(self._done[-1] + one)
        self._began = self._saved = time.monotonic()
        if first:
            print(f"{stage}: goes on at step {first} of {len(work)}", file=sys.stderr)

    def step(
        self,
        number: int,
        told: dict[str, float],
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Shows step `number` (from 0), and saves now and then and at the end."""
        last = self.show(number, told)
        if last or time.monotonic() - self._saved > self._save_every_s:
            path = self._folder / f"{self._stage}.pt"
            scratch = path.with_suffix(".new")
            torch.save(
                {
                    "module": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": number + 1,
                    "seconds": self.seconds(),
                },
                scratch,
            )
            scratch.replace(path)
            self._saved = time.monotonic()

    def show(self, number: int, told: dict[str, float]) -> bool:
        """Shows step `number` now and then; returns whether it is the stage's last."""
        last = number + 2 == len(self._done)
        if number % _TELL_EVERY == _TELL_EVERY - 1 or len(told) > 1 or last:
            steps = f"{self._stage} {number + 1}/{len(self._done) - 1}"
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in told.items())
            print(f"{steps}  {numbers}  {self._left(number)}", file=sys.stderr, flush=True)
        return last

    def minutes(self) -> float:
        """How long all stages have taken until now, interrupted runs included."""
        self._before[self._stage] = self.seconds()
        self._began = time.monotonic()
        return sum(self._before.values()) / 60

    def spent(self, stage: str, seconds: float) -> None:
        """Counts what an earlier run has spent on a stage that need not be run again."""
        self._before[stage] = seconds

    def seconds(self) -> float:
        """How long the stage that is shown has taken until now."""
        return self._before.get(self._stage, 0.0) + time.monotonic() - self._began

    def _left(self, number: int) -> str:
        """Time left of this stage by the work done, of the later ones by their usual share."""
        reached, total = self._done[number + 1] - self._done[self._first], self._done[-1]
        pace = (time.monotonic() - self._began) / reached
        whole = pace * total
        later = list(self._stages)[list(self._stages).index(self._stage) + 1 :]
        left = pace * (total - self._done[number + 1])
        left += whole * sum(self._stages[name] for name in later) / self._stages[self._stage]
        return f"about {left / 60:.0f} min left"


def prefetch(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """`make(n)` for every number in order, made ahead of time in another process."""

    class Numbered(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.numbers = list(numbers)

        def __len__(self) -> int:
            return len(self.numbers)

        def __getitem__(self, i: int) -> T:
            return make(self.numbers[i])

    yield from torch.utils.data.DataLoader(
        Numbered(), batch_size=None, num_workers=1, prefetch_factor=4
    )
