"""Processes that train together: each computes its part of every batch, and they agree.

A process that belongs to no process group of torch's is alone, and nothing here costs it
anything. Whoever starts several of them says so in their environment, as torchrun does, and
`process_group` makes the group; they all hold the same parameters and make the same draws, so only
sums over images pass between them.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import Store, TCPStore


T = TypeVar("T")

MEETING_SECONDS = 300
"""How long the processes of a group wait for one another at its start."""


@contextmanager
def process_group(device: torch.device, *, meeting: Path) -> Iterator[None]:
    """Be one of the processes that this one's environment speaks of; alone if it speaks of none.

    ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` are torchrun's. Where ``MASTER_ADDR`` stands with
    them they meet there; otherwise the first process takes a port that is free and writes down
    where it is, so that no port is guessed.

    Args:
        device: Where they compute: accelerators are shared out by ``LOCAL_RANK``.
        meeting: The file that says where they meet, of this start of this group alone.

    Raises:
        TimeoutError: The first process did not come.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type != "cpu":
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())
    if count == 1:
        yield
        return
    mine = int(os.environ["RANK"])
    wait = timedelta(seconds=MEETING_SECONDS)
    kind = {"cuda": "nccl", "xpu": "xccl"}.get(device.type, "gloo")
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(kind)
    else:
        store = _meet(meeting, mine, count, wait)
        dist.init_process_group(kind, store=store, rank=mine, world_size=count)
        if mine == 0:  # all have come
            meeting.unlink()
    yield
    # Not after an error: an orderly end may wait for processes that do not come any more.
    dist.destroy_process_group()


def _meet(meeting: Path, mine: int, count: int, wait: timedelta) -> Store:
    """The store that the processes of a group find one another by."""
    if mine == 0:
        store = TCPStore(
            "0.0.0.0",  # noqa: S104 (torch listens everywhere in any case)
            0, count, is_master=True, wait_for_workers=False, timeout=wait,
        )  # fmt: skip
        beside = meeting.with_name(f".{meeting.name}.part")
        beside.write_text(json.dumps({"host": socket.gethostname(), "port": store.port}))
        beside.replace(meeting)
        return store
    until = time.monotonic() + wait.total_seconds()
    while not meeting.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{meeting} did not appear in {wait.total_seconds():g} s")
        time.sleep(0.05)
        list(meeting.parent.iterdir())  # makes network file systems look again
    place = json.loads(meeting.read_text())
    return TCPStore(place["host"], place["port"], count, is_master=False, timeout=wait)


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _has_group() else 1


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Make each tensor, in place, its sum over all processes, in one exchange.

    Args:
        tensors: On one device and of one type; of the same shapes in every process.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def all_reduce_any(yes: bool, *, device: torch.device) -> bool:  # noqa: FBT001 (it is the question)
    """Whether some process says yes."""
    if world_size() == 1:
        return yes
    said = torch.tensor(int(yes), device=device)
    all_reduce_sum([said])
    return bool(said)


def broadcast(value: T, *, device: torch.device) -> T:
    """What the first process has, which is plain data, in every process.

    Args:
        value: Only the first process's matters.
        device: Where messages pass: the accelerator, with a group that needs one.
    """
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=device)
    return holder[0]


def all_gather(value: T) -> list[T]:
    """What every process has, which is plain data, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    holders: list[Any] = [None] * world_size()
    dist.all_gather_object(holders, value)
    return holders


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, which are BatchNorm's running statistics.

    Each process normalises its own images, so their statistics differ; as in the paper, there
    is no synchronised BatchNorm.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until every process has got here."""
    if world_size() > 1:
        dist.barrier()


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
