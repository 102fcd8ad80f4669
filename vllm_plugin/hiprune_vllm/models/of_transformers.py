"""Query and key of a tower that is transformers' own: there is no attention module to hook.

Its blocks call one of the attention functions that transformers keeps by name, and take the name
from their configuration. While somebody listens, a block has a configuration that names a function
of ours: it passes on what it is called with and then does what the named one does. Nothing but
this one block is touched.
"""

import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hiprune_vllm.pruning.record import Listening, Note

NAME: Final = "hiprune_noted"
"""Of our function among those of transformers."""


class _Noted:
    """A block's configuration that names our function and is itself in all else."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.notes: list[Note] = []

    _attn_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


class _Listening:
    def __init__(self, module: Any, note: Note) -> None:
        self._module, self._note = module, note
        if not isinstance(module.config, _Noted):
            module.config = _Noted(module.config)
        module.config.notes.append(note)

    def remove(self) -> None:
        noted = self._module.config
        if not isinstance(noted, _Noted) or self._note not in noted.notes:
            return
        noted.notes.remove(self._note)
        if not noted.notes:
            self._module.config = noted.config


def of_transformers(module: nn.Module, note: Note) -> Listening:
    """A `Source`: of an attention module of transformers', which has a `config`."""
    return _Listening(module, note)


def _noting(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Called as transformers calls its functions, query and key (B, H, T, D)."""
    noted: _Noted = module.config
    scale = kwargs.get("scaling")
    groups = query.shape[1] // key.shape[1]
    every = key if groups == 1 else key.repeat_interleave(groups, dim=1)
    for note in tuple(noted.notes):  # they may end their listening
        note(
            query.transpose(1, 2),
            every.transpose(1, 2),
            query.shape[-1] ** -0.5 if scale is None else scale,
        )
    run: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        noted.config._attn_implementation,
        # Of this name in every module of transformers' that has attention.
        getattr(sys.modules[type(module).__module__], "eager_attention_forward", None),
    )
    return run(module, query, key, value, *args, **kwargs)


AttentionInterface.register(NAME, _noting)
