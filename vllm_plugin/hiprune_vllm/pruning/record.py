"""Reads Q and K of a vision tower while it runs and turns them into scores.

A recorder hangs on the attention modules of the layers that the images at hand need, and only
while it records; the modules' own results are not touched, and nothing else in the process is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.clock import SELECTION
from hiprune_vllm.pruning.scores import attention_received
from hiprune_vllm.tuning import chosen


class EncoderAttention(Protocol):
    """What is read off an attention module: called as `module(query, key, value, ...)`."""

    num_heads: int
    head_size: int
    scale: float


Note = Callable[[torch.Tensor, torch.Tensor, float], None]
"""Takes query and key, (B, T, H, D), and what their product is multiplied by."""


class Listening(Protocol):
    """What is to be ended."""

    def remove(self) -> None: ...


Source = Callable[[nn.Module, Note], Listening]
"""Calls a `Note` whenever an attention module runs, until what it returns is removed."""


def of_vllm(module: nn.Module, note: Note) -> Listening:
    """Of vLLM's own encoder attention, a module that is called with query and key."""

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attention = cast(EncoderAttention, module)
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        shape = (*query.shape[:2], attention.num_heads, attention.head_size)
        note(query.reshape(shape), key.reshape(shape), attention.scale)

    return module.register_forward_pre_hook(called, with_kwargs=True)


SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""Adds per-rank partial sums so that every rank gets bit-identical totals."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One thing to record: `rows` of the batch, at 1-based `layer`, in score kind `score`."""

    layer: int
    score: str
    rows: tuple[int, ...]


def wanted_scores(
    budgets: Mapping[int, ImageBudget],
    output_layer: int,
    traced: Mapping[int, tuple[int, str]] | None = None,
) -> list[Wanted]:
    """Which scores a batch needs.

    Args:
        budgets: by row of the batch, rows without one need none.
        output_layer: 1-based.
        traced: rows whose scores of an object layer and the output layer are wanted in any case
            -> that layer and the kind of score.
    """
    rows: dict[tuple[int, str], set[int]] = {}
    for row, budget in budgets.items():
        if budget.needs_attention:
            rows.setdefault((output_layer, budget.score), set()).add(row)
            if budget.anchors:
                rows.setdefault((budget.object_layer, budget.score), set()).add(row)
    for row, (layer, score) in (traced or {}).items():
        for wanted in (layer, output_layer):
            rows.setdefault((wanted, score), set()).add(row)
    return [Wanted(layer, score, tuple(sorted(found))) for (layer, score), found in rows.items()]


class ScoreRecorder:
    """Scores of chosen layers of one vision tower whose batch rows are whole images.

    Args:
        layers: attention modules of all executed blocks, in order; `layers[0]` is layer 1.
        heads: H, attention heads of a block over all ranks.
        leading_tokens: tokens before the image's own (1 with a CLS token); they count among the
            tokens that attend, their own columns are dropped (Eq. 2).
        sum_over_ranks: with tensor parallelism, where each rank holds some heads.
        spans: where all images stand in one row of the batch, start and stop of each; "row" then
            means the number of an image. Attention is over that image alone, whatever windows
            the block itself attends in (section 4).
        source: where query and key of a layer come from.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        heads: int,
        leading_tokens: int,
        sum_over_ranks: SumOverRanks | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        source: Source = of_vllm,
    ) -> None:
        self._layers = layers
        self._heads = heads
        self._leading = leading_tokens
        self._sum_over_ranks = sum_over_ranks
        self._spans = spans
        self._source = source

    @contextmanager
    def recording(
        self, wanted: Sequence[Wanted]
    ) -> Iterator[dict[tuple[int, str, int], torch.Tensor]]:
        """While inside, fills the yielded dict: (layer, score, batch row) -> (N,) fp32 scores.

        Each layer is recorded the first time it runs.
        """
        scores: dict[tuple[int, str, int], torch.Tensor] = {}
        handles = []
        try:
            for item in wanted:
                module = self._layers[item.layer - 1]
                handles.append(self._listen(module, item, scores))
            yield scores
        finally:
            for handle in handles:
                handle.remove()

    def _listen(
        self, module: nn.Module, item: Wanted, scores: dict[tuple[int, str, int], torch.Tensor]
    ) -> Listening:
        def record(query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
            # A layer is seen once: the output block runs its second part with nothing to score.
            handle.remove()
            with SELECTION.running(query.device):
                note(query, key, scale)

        def note(query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
            if self._spans is None:
                if item.rows != tuple(range(len(query))):
                    query, key = query[list(item.rows)], key[list(item.rows)]
                received = list(self._received(query, key, scale, item))
            else:
                spans = [slice(*self._spans[row]) for row in item.rows]
                received = [
                    self._received(query[:, span], key[:, span], scale, item)[0] for span in spans
                ]
            for row, values in zip(item.rows, received, strict=True):
                scores[item.layer, item.score, row] = values

        handle = self._source(module, record)
        return handle

    def _received(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, item: Wanted
    ) -> torch.Tensor:
        score: Callable[..., torch.Tensor] = attention_received
        on_gpu = query.device.type == "cuda"
        if on_gpu and chosen("PRUNING_SCORE_KERNEL") == "triton":  # pragma: no cover
            from hiprune_vllm.pruning import kernel  # noqa: PLC0415  (no Triton without a GPU)

            score = kernel.attention_received
        received = score(query, key, scale, from_first_only=item.score == "cls")[:, self._leading :]
        # Where its heads do not split over the ranks each has all of them, and the whole sum.
        if self._sum_over_ranks is not None and query.shape[2] < self._heads:
            received = self._sum_over_ranks(received)
        return received / self._heads
