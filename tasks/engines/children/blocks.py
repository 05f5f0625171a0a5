"""Finding a model's decoder blocks and watching their states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tasks.domain.errors import ModelUnsupported


def decoder_blocks(model: Any, layers: int) -> nn.ModuleList:
    """The model's list of decoder blocks; raises ModelUnsupported unless there is exactly one of that length."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layers
        and name.split(".")[-1] in ("layers", "h", "blocks")
    ]
    if len(found) != 1:
        raise ModelUnsupported(f"{type(model).__name__}: {len(found)} lists of {layers} blocks instead of one")
    return found[0]


@contextmanager
def recorded_states(blocks: nn.ModuleList, rows: torch.Tensor, places: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """While open, a forward pass fills the list with L+1 states (N, hidden), those of N tokens of the batch.

    State l enters block l; the last one leaves the last block, before the final norm. rows, places: where in the
    batch each of the tokens stands. Only theirs are kept: whole states of all blocks would take most of the memory.
    """
    states: list[torch.Tensor] = []

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[rows, places])

    def leaving(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[rows, places])

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(leaving))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassed(blocks: nn.ModuleList, removed: Iterable[int]) -> Iterator[None]:
    """While open, these blocks hand the state on as it is."""
    replaced = {block: blocks[block] for block in removed}
    for number, block in replaced.items():
        blocks[number] = _Bypass(block)
    try:
        yield
    finally:
        for number, block in replaced.items():
            blocks[number] = block


class _Bypass(nn.Module):
    """Hands the state on; keeps the replaced block's attributes, which some models read."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["replaced"] = block  # no submodule: its weights are out of the model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["replaced"], name)

    def forward(self, hidden_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        return hidden_states
