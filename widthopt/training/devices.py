"""The device, precision and memory format that a `Runtime` selects on this machine."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from widthopt.errors import InputError
from widthopt.setting import Runtime


def resolve_device(runtime: Runtime) -> torch.device:
    """Return the device to compute on; ``auto`` is this machine's accelerator, else the CPU.

    Raises:
        InputError: This machine has no such device.
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
            torch.empty(0, device=device)  # fails if the index is too high
            return device
    except RuntimeError:
        pass
    raise InputError(
        f"runtime.device is {runtime.device}, but this machine has no such device; "
        f"use one of {', '.join(usable)}"
    )


def memory_format(runtime: Runtime, device: torch.device) -> torch.memory_format:
    """Return the format of images and weights; ``auto`` is channels last on CUDA only."""
    last = runtime.memory_format == "channels_last" or (
        runtime.memory_format == "auto" and device.type == "cuda"
    )
    return torch.channels_last if last else torch.contiguous_format


def wrong_in_channels_last(module: nn.Module) -> bool:
    """Whether a CPU computes a wrong gradient for a module in channels-last format.

    oneDNN does for strided 1x1 convolutions that read fewer channels than one of its blocks holds
    (8 or 16): it writes beyond its workspace. Gradients are wrong by any factor, the heap is
    corrupted, or threads hang. The current number of channels and groups is ignored, because
    subnets and pruned networks may be narrow anywhere.

    Source: https://github.com/uxlfoundation/oneDNN/issues/6035 (oneDNN 3.12, torch 2.13).
    """
    return (
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and set(module.stride) != {1}
    )


def _force_contiguous(module: nn.Module) -> None:
    """Make a convolution compute in contiguous format: its weight and its input."""
    assert isinstance(module.weight, nn.Parameter)
    # `contiguous` would not copy: a 1x1 weight is contiguous in both formats.
    module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
    if _make_contiguous not in module._forward_pre_hooks.values():  # noqa: SLF001 (no public API)
        module.register_forward_pre_hook(_make_contiguous)


def _make_contiguous(
    _module: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)


def to_device(model: nn.Module, runtime: Runtime) -> tuple[torch.device, torch.memory_format]:
    """Move ``model``, in place, to the device and memory format that `Runtime` selects.

    Returns:
        The device, and the memory format that images should have too.

    Raises:
        InputError: This machine has no such device.
    """
    device = resolve_device(runtime)
    layout = memory_format(runtime, device)
    model.to(device)
    model.to(memory_format=layout)  # type: ignore[call-overload]  # torch has no overload for it
    if device.type == "cpu" and layout == torch.channels_last:
        for module in model.modules():
            if wrong_in_channels_last(module):
                _force_contiguous(module)
    return device, layout


def autocast(runtime: Runtime, device: torch.device) -> AbstractContextManager[object]:
    """Return a context for forward passes: bfloat16 where `Runtime` and the device allow it.

    Parameters stay float32. A device that only emulates bfloat16 counts as one without it.
    """
    enabled = runtime.precision == "bfloat16" or (
        runtime.precision == "auto" and _has_bfloat16(device)
    )
    return torch.autocast(device.type, dtype=torch.bfloat16) if enabled else nullcontext()


def _has_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator supports bfloat16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "xpu"
