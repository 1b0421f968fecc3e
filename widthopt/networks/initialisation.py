"""Weight initialisation, as torchvision initialises its networks.

Any network that is not torchvision's is initialised by its own ``reset_parameters()`` if it has
one, else as torch's layers are. The initialisers are those of the constructors in torchvision
0.21 to 0.28.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import init


Initialiser = Callable[[str, nn.Module], None]
"""Initialises one layer, given its name in the network."""


def initialise(model: nn.Module, *, seed: int) -> None:
    """Give every layer of a network fresh weights; the global rng state is preserved.

    Args:
        model: Any network. Its layers may have other sizes than those it was built with.
        seed: The weights depend only on this and on the network.
    """
    initialise_layer = _initialiser(type(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reset = getattr(model, "reset_parameters", None)
        if initialise_layer is None and callable(reset):
            reset()
            return
        # A module that resets its children itself overrides them, so children come first.
        for name, module in reversed(list(model.named_modules())):
            own = getattr(module, "reset_parameters", None)
            if callable(own) and module is not model:
                own()
            if initialise_layer is not None:
                initialise_layer(name, module)


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


_INITIALISERS: dict[str, Initialiser] = {
    "torchvision.models.resnet.ResNet": _resnet,
    "torchvision.models.mobilenetv2.MobileNetV2": _mobilenet,
    "torchvision.models.mobilenetv3.MobileNetV3": _mobilenet,
    "torchvision.models.vgg.VGG": _mobilenet,  # the same: Gaussian by fan-out, and 0.01
    "torchvision.models.mnasnet.MNASNet": _mnasnet,
    "torchvision.models.regnet.RegNet": _regnet,
    "torchvision.models.efficientnet.EfficientNet": _efficientnet,
    "torchvision.models.convnext.ConvNeXt": _convnext,
    "torchvision.models.densenet.DenseNet": _densenet,
    "torchvision.models.squeezenet.SqueezeNet": _squeezenet,
    "torchvision.models.inception.Inception3": _inception,
    "torchvision.models.googlenet.GoogLeNet": _googlenet,
}
"""Initialisers that differ from torch's defaults, which AlexNet and ShuffleNetV2 use.

Keyed by class name, since torchvision takes as long to import as torch.
"""


def _initialiser(kind: type[nn.Module]) -> Initialiser | None:
    """Return the initialiser of a torchvision network, or of a subclass; None without one."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((_INITIALISERS[name] for name in names if name in _INITIALISERS), None)
