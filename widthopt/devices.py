"""What `Runtime` means on this machine: the device, its precision and its memory format."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from widthopt.errors import InputError
from widthopt.setting import Runtime


def resolve_device(runtime: Runtime) -> torch.device:
    """The device to compute on; ``auto`` is the accelerator of this machine, else the CPU.

    Raises:
        InputError: There is no such device here.
    """
    accelerator = None
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
    if runtime.device == "auto":
        return accelerator or torch.device("cpu")
    usable = sorted({"auto", "cpu"} | ({accelerator.type} if accelerator else set()))
    try:
        device = torch.device(runtime.device)
        if device.type in usable:
            torch.empty(0, device=device)  # finds a number that is too high
            return device
    except RuntimeError:
        pass
    raise InputError(
        f"runtime.device is {runtime.device}, but this machine has no such device; "
        f"use one of {', '.join(usable)}"
    )


def memory_format(runtime: Runtime, device: torch.device) -> torch.memory_format:
    """How images and convolution weights lie in memory; ``auto`` is channels last on CUDA only."""
    last = runtime.memory_format == "channels_last" or (
        runtime.memory_format == "auto" and device.type == "cuda"
    )
    return torch.channels_last if last else torch.contiguous_format


def place(model: nn.Module, runtime: Runtime) -> tuple[torch.device, torch.memory_format]:
    """Move ``model``, in place, to where and how `Runtime` says.

    Returns:
        The device, and the memory format that images should have as well.

    Raises:
        InputError: There is no such device here.
    """
    device = resolve_device(runtime)
    layout = memory_format(runtime, device)
    model.to(device)
    model.to(memory_format=layout)  # type: ignore[call-overload]  # torch left it out
    return device, layout


def autocast(runtime: Runtime, device: torch.device) -> AbstractContextManager[object]:
    """A fresh context for forward passes: bfloat16 where `Runtime` and the device will have it.

    Parameters stay float32. A device that only emulates bfloat16 counts as one without it.
    """
    wanted = runtime.precision == "bfloat16" or (
        runtime.precision == "auto" and _has_bfloat16(device)
    )
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def _has_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator computes in bfloat16 itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "xpu"
