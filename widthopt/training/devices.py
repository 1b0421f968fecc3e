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


def wrong_in_channels_last(module: nn.Module) -> bool:
    """Whether a CPU computes a module's gradient wrongly where channels come last.

    oneDNN does for convolutions of one pixel with a stride that read fewer channels than one of
    its blocks holds (8 or 16): it writes beyond its work space. Gradients come out wrong by any
    factor, the heap is damaged, or threads hang. How many channels and groups there are at the
    moment does not matter here, for subnets and pruned networks are narrow anywhere.

    Source: https://github.com/uxlfoundation/oneDNN/issues/6035 (oneDNN 3.12, torch 2.13).
    """
    return (
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and set(module.stride) != {1}
    )


def _force_contiguous(module: nn.Module) -> None:
    """Let a convolution work with channels first, its weight and what it is given."""
    assert isinstance(module.weight, nn.Parameter)
    # As `contiguous` would not: of one pixel, both orders count as that.
    module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
    if _channels_first not in module._forward_pre_hooks.values():  # noqa: SLF001 (nothing else tells)
        module.register_forward_pre_hook(_channels_first)


def _channels_first(
    _module: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(one.contiguous() for one in inputs)


def to_device(model: nn.Module, runtime: Runtime) -> tuple[torch.device, torch.memory_format]:
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
    if device.type == "cpu" and layout == torch.channels_last:
        for module in model.modules():
            if wrong_in_channels_last(module):
                _force_contiguous(module)
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
