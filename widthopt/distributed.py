"""Processes that train together: each computes its part of every batch, and they agree.

A process that belongs to no process group of torch's is alone, and nothing here costs it
anything. Whoever starts several of them makes the group (see `torch.distributed`); they all
hold the same parameters and make the same draws, so only sums over images pass between them.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist


T = TypeVar("T")


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if _grouped() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _grouped() else 1


def add(tensors: Sequence[Tensor]) -> None:
    """Make each tensor, in place, its sum over all processes, in one exchange.

    Args:
        tensors: On one device and of one type; of the same shapes in every process.
    """
    if ranks() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def any_of(yes: bool, *, device: torch.device) -> bool:  # noqa: FBT001 (it is the question)
    """Whether some process says yes."""
    if ranks() == 1:
        return yes
    said = torch.tensor(int(yes), device=device)
    add([said])
    return bool(said)


def of_first(value: T, *, device: torch.device) -> T:
    """What the first process has, which is plain data, in every process.

    Args:
        value: Only the first process's matters.
        device: Where messages pass: the accelerator, with a group that needs one.
    """
    if ranks() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=device)
    return holder[0]


def of_each(value: T) -> list[T]:
    """What every process has, which is plain data, in the order of their ranks."""
    if ranks() == 1:
        return [value]
    holders: list[Any] = [None] * ranks()
    dist.all_gather_object(holders, value)
    return holders


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, which are BatchNorm's running statistics.

    Each process normalises its own images, so their statistics differ; as in the paper, there
    is no synchronised BatchNorm.
    """
    if ranks() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wait() -> None:
    """Wait until every process has got here."""
    if ranks() > 1:
        dist.barrier()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
