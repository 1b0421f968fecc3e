"""Checkpoints: tensors (safetensors) and JSON, so that nothing that is loaded can run code.

A checkpoint is a folder ``step-00000123`` with ``tensors.safetensors`` and ``state.json``. It
appears under that name only when all of it is on the disk, and says itself whether it is
whole. The two newest are kept, so that there is always one to go back to.
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
    """A checkpoint that is whole.

    Attributes:
        step: Optimiser steps taken.
        state: Plain data.
        tensors: By name, on the CPU.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def save(folder: Path, *, step: int, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the checkpoint of ``step`` into ``folder`` and let go of all but the two newest.

    A later step that is already there is a damaged one that `newest` passed over; it goes too.

    Args:
        folder: Made if missing.
        step: Optimiser steps taken.
        state: Plain data; see `widthopt.identity.canonical`.
        tensors: By name, on any device; they may share memory.

    Raises:
        InputError: The disk is full or the folder cannot be written; what was there is kept.
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
        for left in folder.glob(".step-*"):  # of a process that was killed while it wrote
            shutil.rmtree(left)
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
        older = [other for other in _steps(folder) if other < step]
        for other in _steps(folder):
            if other > step or other in older[_KEPT - 1 :]:
                shutil.rmtree(folder / f"step-{other:08d}")


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that is whole, or None.

    One that was cut short or altered is passed over, with a warning that names it.
    """
    for step in _steps(folder):
        path = folder / f"step-{step:08d}"
        try:
            return _load(path, step)
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s); the checkpoint before it is used", path, error)
    return None


def _load(path: Path, step: int) -> Checkpoint:
    """The checkpoint at ``path``.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file is not what was written.
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
    """The steps that have a checkpoint in ``folder``, damaged or not, newest first."""
    if not folder.is_dir():
        return []
    names = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted((int(name[1]) for name in names if name), reverse=True)


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, rows in order: safetensors takes no shared and no permuted memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _digest(content: bytes) -> str:
    """SHA-256 in hex digits."""
    return hashlib.sha256(content).hexdigest()
