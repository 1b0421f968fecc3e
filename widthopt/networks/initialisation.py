"""How weights start: as torchvision starts those of its own networks.

A network that is not torchvision's starts by its own ``reset_parameters()``, if it has one,
else as torch's layers do. The laws are those of the constructors in torchvision 0.21 to 0.28.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import init


Law = Callable[[str, nn.Module], None]
"""Starts one layer, given its name in the network."""


def initialise(model: nn.Module, *, seed: int) -> None:
    """Give every layer of a network fresh weights; the caller's generators stay untouched.

    Args:
        model: Any network; its layers' sizes need not be those it was built with.
        seed: The weights depend on this and on the network alone.
    """
    law = _law(type(model))
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


_LAWS: dict[str, Law] = {
    "torchvision.models.resnet.ResNet": _resnet,
    "torchvision.models.mobilenetv2.MobileNetV2": _mobilenet,
    "torchvision.models.mobilenetv3.MobileNetV3": _mobilenet,
    "torchvision.models.vgg.VGG": _mobilenet,  # the same two laws: Gaussian by fan-out, and 0.01
    "torchvision.models.mnasnet.MNASNet": _mnasnet,
    "torchvision.models.regnet.RegNet": _regnet,
    "torchvision.models.efficientnet.EfficientNet": _efficientnet,
    "torchvision.models.convnext.ConvNeXt": _convnext,
    "torchvision.models.densenet.DenseNet": _densenet,
    "torchvision.models.squeezenet.SqueezeNet": _squeezenet,
    "torchvision.models.inception.Inception3": _inception,
    "torchvision.models.googlenet.GoogLeNet": _googlenet,
}
"""Laws that differ from torch's own; AlexNet and ShuffleNetV2 start as torch's layers do.

The classes are named, since torchvision takes as long to import as torch.
"""


def _law(kind: type[nn.Module]) -> Law | None:
    """The law of a network of torchvision's, or of one that a user has derived from it."""
    laws = (_LAWS.get(f"{one.__module__}.{one.__qualname__}") for one in kind.__mro__)
    return next((law for law in laws if law is not None), None)
