"""Checkpoints: tensors (safetensors) and JSON, so that nothing that is loaded can run code.

A checkpoint is a folder ``step-00000123`` with ``tensors.safetensors`` and ``state.json``. It
gets that name only when all of it is on the disk, and contains checksums that show whether it is
intact. The two newest are kept, so that there is always one to fall back to.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from widthopt.files import sync_folder, write_through, writing
from widthopt.identity import canonical


logger = logging.getLogger("widthopt")

_KEPT = 2
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An intact checkpoint.

    Attributes:
        step: Number of optimiser steps taken.
        state: Plain data.
        tensors: By name, on the CPU.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def save(folder: Path, *, step: int, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the checkpoint of ``step`` into ``folder`` and remove all but the two newest.

    A checkpoint of a later step is a damaged one that `newest` skipped; it is removed too.

    Args:
        folder: Created if missing.
        step: Number of optimiser steps taken.
        state: Plain data; see `widthopt.identity.canonical`.
        tensors: By name, on any device; they may share memory.

    Raises:
        InputError: The disk is full or the folder cannot be written. Existing checkpoints are kept.
    """
    content = safetensors.torch.save({name: _copy(tensor) for name, tensor in tensors.items()})
    described: dict[str, Any] = {
        "state": state,
        "tensors": {"sha256": _digest(content), "bytes": len(content)},
    }
    described["sha256"] = _digest(canonical(described).encode())
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.part"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for partial_write in folder.glob(".step-*"):  # of a process killed while writing
            shutil.rmtree(partial_write)
        try:
            partial.mkdir()
            write_through(partial / "tensors.safetensors", content)
            write_through(partial / "state.json", canonical(described).encode())
            sync_folder(partial)
            if final.exists():
                final.rename(folder / f".{final.name}.old")
            partial.rename(final)
            sync_folder(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(folder / f".{final.name}.old", ignore_errors=True)
        older = [stored for stored in _steps(folder) if stored < step]
        for stored in _steps(folder):
            if stored > step or stored in older[_KEPT - 1 :]:
                shutil.rmtree(folder / f"step-{stored:08d}")


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint in ``folder``, or None.

    A truncated or altered checkpoint is skipped, with a warning that names it.
    """
    for step in _steps(folder):
        path = folder / f"step-{step:08d}"
        try:
            return _load(path, step)
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s); using the checkpoint before it", path, error)
    return None


def _load(path: Path, step: int) -> Checkpoint:
    """Load the checkpoint at ``path``.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file differs from what was written.
    """
    described = json.loads((path / "state.json").read_bytes())
    if not isinstance(described, dict):
        raise ValueError("state.json is altered")  # noqa: TRY004 (damage, not a wrong call)
    stated = described.pop("sha256", None)
    if stated != _digest(canonical(described).encode()):
        raise ValueError("state.json is altered")
    content = (path / "tensors.safetensors").read_bytes()
    size = described["tensors"]["bytes"]
    if len(content) != size:
        raise ValueError(f"tensors.safetensors has {len(content):,} of {size:,} bytes")
    if described["tensors"]["sha256"] != _digest(content):
        raise ValueError("tensors.safetensors is altered")
    return Checkpoint(step, described["state"], safetensors.torch.load(content))


def _steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in ``folder``, damaged or not, newest first."""
    if not folder.is_dir():
        return []
    names = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted((int(name[1]) for name in names if name), reverse=True)


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to contiguous CPU memory: safetensors takes no shared or permuted memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _digest(content: bytes) -> str:
    """Return the SHA-256 digest in hex digits."""
    return hashlib.sha256(content).hexdigest()
