"""Data-parallel training: every process computes its part of each batch.

Without a process group of torch's, the world size is 1 and every collective returns immediately.
A launcher such as torchrun sets the environment variables of several processes, and
`process_group` makes the group. All processes hold the same parameters and draw the same random
numbers, so they exchange only sums over images.
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
"""How long the processes of a group wait for each other at the start."""


@contextmanager
def process_group(device: torch.device, *, meeting: Path) -> Iterator[None]:
    """Join the process group that the environment describes; do nothing without one.

    ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` are those of torchrun. If ``MASTER_ADDR`` is set
    too, the processes meet at that address. Otherwise rank 0 binds a free port and writes its
    address to a file, so that no port has to be chosen in advance.

    Args:
        device: The device to compute on; ``LOCAL_RANK`` selects one of several accelerators.
        meeting: The file with the address; every start of a group needs a new one.

    Raises:
        TimeoutError: Rank 0 did not write its address in time.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type != "cpu":
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())
    if count == 1:
        yield
        return
    rank = int(os.environ["RANK"])
    wait = timedelta(seconds=MEETING_SECONDS)
    kind = {"cuda": "nccl", "xpu": "xccl"}.get(device.type, "gloo")
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(kind)
    else:
        store = _meet(meeting, rank, count, wait)
        dist.init_process_group(kind, store=store, rank=rank, world_size=count)
        if rank == 0:  # all processes have joined
            meeting.unlink()
    yield
    # Not after an error: this may wait for processes that have ended.
    dist.destroy_process_group()


def _meet(meeting: Path, rank: int, count: int, wait: timedelta) -> Store:
    """Return the store through which the processes of a group find each other."""
    if rank == 0:
        store = TCPStore(
            "0.0.0.0",  # noqa: S104 (torch listens on all interfaces anyway)
            0, count, is_master=True, wait_for_workers=False, timeout=wait,
        )  # fmt: skip
        partial = meeting.with_name(f".{meeting.name}.part")
        partial.write_text(json.dumps({"host": socket.gethostname(), "port": store.port}))
        partial.replace(meeting)
        return store
    until = time.monotonic() + wait.total_seconds()
    while not meeting.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{meeting} did not appear in {wait.total_seconds():g} s")
        time.sleep(0.05)
        list(meeting.parent.iterdir())  # refreshes the cache of network file systems
    address = json.loads(meeting.read_text())
    return TCPStore(address["host"], address["port"], count, is_master=False, timeout=wait)


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if _has_group() else 1


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes, in one exchange.

    Args:
        tensors: On the same device and of the same type; with equal shapes in every process.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def all_reduce_any(flag: bool, *, device: torch.device) -> bool:  # noqa: FBT001 (the value to reduce)
    """Return whether the flag is true in any process."""
    if world_size() == 1:
        return flag
    count = torch.tensor(int(flag), device=device)
    all_reduce_sum([count])
    return bool(count)


def broadcast(value: T, *, device: torch.device) -> T:
    """Return the value of rank 0 in every process.

    Args:
        value: Plain data; ignored except in rank 0.
        device: The device of the group's messages: the accelerator if its backend needs one.
    """
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=device)
    return holder[0]


def all_gather(value: T) -> list[T]:
    """Return the values of all processes, which are plain data, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    holders: list[Any] = [None] * world_size()
    dist.all_gather_object(holders, value)
    return holders


def share_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0, such as BatchNorm's running statistics, to every process.

    Each process normalises its own images, so the statistics differ. As in the paper, BatchNorm
    is not synchronised.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.barrier()


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
