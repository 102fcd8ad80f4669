"""The output block for kept tokens only.

Its scores need no more than its own Q and K. So vLLM's block runs as far as its attention; there
the tokens are chosen, and the rest (attention, its projection, the MLP, whatever norm follows) runs
for the kept ones. From here on a token depends on others through K and V alone, and these stay
those of all tokens.

Not a line of the block is written again: it is called twice, the first time up to its attention,
the second time with the kept rows, where attention gives what is due to them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class Kept:
    """What stays of one image.

    Attributes:
        start, stop: its tokens among all of the batch, rows of the flattened hidden states.
        rows: (kept,) int64, those that stay, counted from `start`.
    """

    start: int
    stop: int
    rows: torch.Tensor


class _Call(NamedTuple):
    """What attention was called with."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]


class _AtAttention(Exception):
    """Leaves a block where its attention is called."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call


@contextmanager
def kept_only(
    block: nn.Module,
    projections: Sequence[nn.Module],
    attention: nn.Module,
    choose: Callable[[], Sequence[Kept]],
    *,
    spare_rows: int = 0,
    within_images: bool,
    by_row: Sequence[str] = (),
) -> Iterator[None]:
    """While inside, `block` returns the kept rows of all images, one after another.

    The hidden states (B, T, width) or (T, 1, width) become (1, kept, width) or (kept, 1, width),
    and (T, width) become (kept, width).

    Args:
        block: a transformer block of vLLM's that calls `attention` once.
        projections: its linear layer that makes Q, K and V together, or those that make one each.
        attention: its encoder attention, called with query, key and value.
        choose: called once Q and K were seen by all hooks of `attention`.
        spare_rows: rows (of no meaning) to return before the others.
        within_images: whether this block attends from every token to all of its image.
        by_row: arguments of `block` that have a row for each row of its hidden states, by name.
    """
    run = block.forward
    names = [*signature(run).parameters][1:]  # the hidden states come first

    def shortened(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _instead(attention, _leave):
            try:
                run(states, *args, **kwargs)
            except _AtAttention as at:
                # Not the exception itself: its traceback would keep every tensor of the block.
                seen = at.call
            else:
                raise RuntimeError("version drift: the output block did not call its attention")
        kept = choose()
        rows = _rows(kept)
        context = _with_spare(_attended(attention, seen, kept, rows, within_images), spare_rows)
        widths = [tensor.shape[2:].numel() for tensor in (seen.query, seen.key, seen.value)]
        if len(projections) == 1:
            widths = [sum(widths)]

        def attended(*_: Any, **__: Any) -> torch.Tensor:
            return context[None]

        few = _only(rows, states, spare_rows)
        some = [
            one[rows] if name in by_row else one for name, one in zip(names, args, strict=False)
        ]
        others = {name: one[rows] if name in by_row else one for name, one in kwargs.items()}
        with ExitStack() as stack:
            for projection, width in zip(projections, widths, strict=True):
                stack.enter_context(_instead(projection, _made_already(projection, width)))
            stack.enter_context(_instead(attention, attended))
            return run(few, *some, **others)

    with _instead(block, shortened):
        yield


@contextmanager
def kept_after(
    block: nn.Module, choose: Callable[[], Sequence[Kept]], *, spare_rows: int = 0
) -> Iterator[None]:
    """As `kept_only`, but `block` runs for all rows before the kept ones are taken.

    Nothing is taken for granted of the block but that it returns as many rows as it gets, first
    where it returns several things.
    """
    run = block.forward

    def cut(*args: Any, **kwargs: Any) -> Any:
        made = run(*args, **kwargs)
        if isinstance(made, tuple):  # some blocks return more beside their rows
            states, *others = made
            return (_only(_rows(choose()), states, spare_rows), *others)
        return _only(_rows(choose()), made, spare_rows)

    with _instead(block, cut):
        yield


@contextmanager
def kept_of_all(
    encoder: nn.Module | None, kept: Sequence[Kept], *, spare_rows: int = 0
) -> Iterator[None]:
    """While inside, the hidden states that `encoder` returns of all its blocks are of kept rows.

    Args:
        encoder: returns a list, the hidden states before its first block first; those behind the
            last one have the kept rows alone already. None for one that returns no others.
        kept: filled in by the time that it returns.
        spare_rows: as for `kept_only`.
    """
    if encoder is None:
        yield
        return
    run = encoder.forward

    def cut(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        *earlier, last = run(*args, **kwargs)
        rows = _rows(kept)
        return [*(_only(rows, states, spare_rows) for states in earlier), last]

    with _instead(encoder, cut):
        yield


@contextmanager
def set_aside(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While inside, what `module` returns is put into the yielded list.

    Its caller gets as many rows as `module` did, which have no columns: some towers split what
    comes behind their blocks into images, by how many rows these had.

    Args:
        module: makes hidden states (1, T, width) of such.
    """
    run, made = module.forward, list[torch.Tensor]()

    def noting(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(run(states, *args, **kwargs))
        return states.new_empty(*states.shape[:-1], 0)

    with _instead(module, noting):
        yield made


@contextmanager
def put_off(
    modules: Sequence[nn.Module], tokens: int
) -> Iterator[Callable[[Sequence[Kept]], list[torch.Tensor]]]:
    """While inside, `modules` only note the hidden states that they are called with.

    What they return meanwhile has a row for each kept token and no column, so that it can be put
    beside what is made of the last block.

    Args:
        modules: each makes a row a token from hidden states (T, 1, width) of some block.
        tokens: that are kept of the batch.

    Yields:
        What they make of the kept rows, each (tokens, width), in the order that they were called
        in. To be called outside.
    """
    noted: list[tuple[nn.Module, torch.Tensor]] = []

    def noting(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def note(states: torch.Tensor) -> torch.Tensor:
            noted.append((module, states))
            return states.new_empty(tokens, 0)

        return note

    def made(kept: Sequence[Kept]) -> list[torch.Tensor]:
        rows = _rows(kept)
        # Behind the last block there are the kept rows alone.
        return [
            module(states if len(states) == len(rows) else _only(rows, states, 0))
            for module, states in noted
        ]

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_instead(module, noting(module)))
        yield made


def _made_already(projection: nn.Module, width: int) -> Callable[[torch.Tensor], Any]:
    """Instead of a linear layer: zeros of its shape, with a bias beside them where it is vLLM's."""

    def zeros(states: torch.Tensor) -> Any:
        # In memory, though nothing reads them: some blocks gather them from all ranks first.
        made = states.new_zeros(*states.shape[:-1], width)
        return made if isinstance(projection, nn.Linear) else (made, None)

    return zeros


def _rows(kept: Sequence[Kept]) -> torch.Tensor:
    return torch.cat([image.start + image.rows for image in kept])


def _only(rows: torch.Tensor, states: torch.Tensor, spare: int) -> torch.Tensor:
    """Some rows of hidden states (B, T, width), (T, 1, width) or (T, width), in one batch row."""
    if states.dim() == 2:
        return _with_spare(states[rows], spare)
    few = _with_spare(states.flatten(0, 1)[rows], spare)
    return few.unsqueeze(1 if states.shape[1] == 1 else 0)


def _with_spare(rows: torch.Tensor, spare: int) -> torch.Tensor:
    return torch.cat([rows[:1].expand(spare, *rows.shape[1:]), rows]) if spare else rows


def _leave(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> torch.Tensor:
    raise _AtAttention(_Call(query, key, value, options))


def _attended(
    attention: Any, seen: _Call, kept: Sequence[Kept], rows: torch.Tensor, within: bool
) -> torch.Tensor:
    """Attention's result for the kept rows, (kept, ...), by vLLM's own kernel.

    PyTorch's kernel takes fewer queries than keys. vLLM's wrappers of the others do not, so there
    all rows attend and the kept ones are taken.
    """
    if not (within and attention.attn_backend.name == "TORCH_SDPA"):
        result: torch.Tensor = attention.forward(seen.query, seen.key, seen.value, **seen.options)
        return result.flatten(0, 1)[rows]
    query, key, value = (x.flatten(0, 1) for x in seen[:3])
    parts = []
    for image in kept:
        # Without `cu_seqlens` one row of the batch is one image.
        of_image = slice(image.start, image.stop)
        some = query[image.start + image.rows]
        parts.append(attention.forward(some[None], key[of_image][None], value[of_image][None])[0])
    return torch.cat(parts)


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """This one module runs `forward` while inside; its hooks run as ever."""
    assert "forward" not in vars(module)
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
