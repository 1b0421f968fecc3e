"""How weights start: as torchvision starts those of its own networks.

A network that is not torchvision's starts by its own ``reset_parameters()``, if it has one,
else as torch's layers do. The laws are those of the constructors in torchvision 0.21 to 0.28.
"""

import math
from collections.abc import Callable

import widthopt.operators  # noqa: F401  (before torchvision)


# isort: split
import torch
from torch import nn
from torch.nn import init
from torchvision import models
from torchvision.models.googlenet import GoogLeNet
from torchvision.models.inception import Inception3


Law = Callable[[str, nn.Module], None]
"""Starts one layer, given its name in the network."""


def initialise(model: nn.Module, *, seed: int) -> None:
    """Give every layer of a network fresh weights; the caller's generators stay untouched.

    Args:
        model: Any network; its layers' sizes need not be those it was built with.
        seed: The weights depend on this and on the network alone.
    """
    law = next((law for kind, law in _LAWS.items() if isinstance(model, kind)), None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reset = getattr(model, "reset_parameters", None)
        if law is None and callable(reset):
            reset()
            return
        # A module that resets its children itself has the last word, so children come first.
        for name, module in reversed(list(model.named_modules())):
            own = getattr(module, "reset_parameters", None)
            if callable(own) and module is not model:
                own()
            if law is not None:
                law(name, module)


def _zero_bias(module: nn.Module) -> None:
    if isinstance(module.bias, torch.Tensor):
        init.zeros_(module.bias)


def _resnet(_: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _mobilenet(_: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        init.kaiming_normal_(module.weight, mode="fan_out")
        _zero_bias(module)
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, 0, 0.01)
        _zero_bias(module)


def _mnasnet(_: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        _zero_bias(module)
    elif isinstance(module, nn.Linear):
        init.kaiming_uniform_(module.weight, mode="fan_out", nonlinearity="sigmoid")
        _zero_bias(module)


def _regnet(_: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels  # not divided by groups
        init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, 0, 0.01)
        _zero_bias(module)


def _efficientnet(_: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        init.kaiming_normal_(module.weight, mode="fan_out")
        _zero_bias(module)
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        init.uniform_(module.weight, -bound, bound)
        _zero_bias(module)


def _convnext(_: str, module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        init.trunc_normal_(module.weight, std=0.02)
        _zero_bias(module)


def _densenet(_: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        _zero_bias(module)


def _squeezenet(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Conv2d):
        return
    if name == "classifier.1":
        init.normal_(module.weight, 0, 0.01)
    else:
        init.kaiming_uniform_(module.weight)
    _zero_bias(module)


def _inception(_: str, module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        std = float(getattr(module, "stddev", 0.1))
        init.trunc_normal_(module.weight, std=std, a=-2, b=2)


def _googlenet(_: str, module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        init.trunc_normal_(module.weight, std=0.01, a=-2, b=2)


_LAWS: dict[type[nn.Module], Law] = {
    models.ResNet: _resnet,
    models.MobileNetV2: _mobilenet,
    models.MobileNetV3: _mobilenet,
    models.VGG: _mobilenet,  # the same two laws: Gaussian by fan-out, and 0.01
    models.MNASNet: _mnasnet,
    models.RegNet: _regnet,
    models.EfficientNet: _efficientnet,
    models.ConvNeXt: _convnext,
    models.DenseNet: _densenet,
    models.SqueezeNet: _squeezenet,
    Inception3: _inception,
    GoogLeNet: _googlenet,
}
"""Laws that differ from torch's own; AlexNet and ShuffleNetV2 start as torch's layers do."""
