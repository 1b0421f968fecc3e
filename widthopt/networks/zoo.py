"""torchvision's classification CNNs by name, with a depth multiplier where builders allow it."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision import models

from widthopt.errors import AxisError, InputError


@dataclass(frozen=True)
class TorchvisionNetwork:
    """A torchvision classification CNN; ``network=torchvision network.name=resnet50``.

    At depth multiplier 1 it is torchvision's own module, so torchvision's weights load into it.
    Auxiliary heads, which exist only during training, are off.

    Attributes:
        name: The name of the network in ``torchvision.models``.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in _names():
            close = [name for name in _names() if name[:4] == self.name[:4]] or _names()
            raise InputError(
                f"network.name is {self.name}, but torchvision has no such classification CNN; "
                f"choose among {', '.join(close)}"
            )

    def build(self, *, depth: int, classes: int) -> nn.Module:
        """See `widthopt.setting.Network`."""
        builder = models.get_model_builder(self.name)
        arguments: dict[str, Any] = {"weights": None, "num_classes": classes}
        if self.name in {"googlenet", "inception_v3"}:
            arguments |= {"aux_logits": False, "init_weights": True}
        if depth == 1:
            model: nn.Module = builder(**arguments)
            return model
        return _deepen(self.name, builder, arguments, depth)

    def stages(self, model: nn.Module) -> list[tuple[str, list[str]]]:
        """See `widthopt.setting.Network`."""
        if isinstance(model, (models.MobileNetV2, models.MobileNetV3)):
            return _mobile_stages(model)
        patterns = (pattern for kind, pattern in _STAGES.items() if isinstance(model, kind))
        pattern = next(patterns, r"(?!)")
        stages = [
            (name, [f"{name}.{child}" for child, m in module.named_children() if _is_block(m)])
            for name, module in model.named_modules()
            if re.fullmatch(pattern, name)
        ]
        return [(name, blocks) for name, blocks in stages if blocks]

    @property
    def rules(self) -> dict[Any, Callable[..., Any]]:
        """An empty mapping: torchvision's CNNs need no tracing rules."""
        return {}


_STAGES: dict[type[nn.Module], str] = {
    models.ResNet: r"layer\d",
    models.RegNet: r"trunk_output\.block\d",
    models.EfficientNet: r"features\.[1-9]",
    models.ConvNeXt: r"features\.[1357]",
    models.DenseNet: r"features\.denseblock\d",
    models.MNASNet: r"layers\.(8|9|1[0-3])",
    models.ShuffleNetV2: r"stage\d",
}
"""Pattern of the modules whose children are the blocks of a stage, by type of network."""


def _is_block(module: nn.Module) -> bool:
    """Whether a child of a stage is a block; EfficientNet's last 1x1 convolution is not."""
    return not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.SiLU))


def _mobile_stages(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Group the blocks of a MobileNet into stages; a block without a shortcut starts a stage.

    The first block of MobileNetV3-Large starts a stage although it has a shortcut.
    """
    stages: list[tuple[str, list[str]]] = []
    for name, block in model.named_modules():
        if not hasattr(block, "use_res_connect"):
            continue
        if not stages or not block.use_res_connect:
            stages.append((f"stage{len(stages) + 1}", []))
        stages[-1][1].append(name)
    return stages


def _names() -> list[str]:
    """Return the names of the classification CNNs: no transformers, detection or video."""
    no_cnn = re.compile("vit_|swin|maxvit")
    return [name for name in models.list_models(module=models) if not no_cnn.match(name)]


def _deepen(
    name: str, builder: Callable[..., Any], arguments: Mapping[str, Any], depth: int
) -> nn.Module:
    kind = inspect.signature(builder).return_annotation
    deepen = _DEEPEN.get(kind)
    if deepen is None:
        raise AxisError(
            "depth",
            f"{depth}, but torchvision's builder of {name} takes no depths; use depth 1, or a "
            "ResNet, RegNet, EfficientNet, ConvNeXt, DenseNet or mobilenet_v2",
        )
    with _record_constructions(kind) as recorded, suppress(_RecordedError):
        builder(**arguments)
    args, kwargs = recorded[0]
    given = inspect.signature(kind.__init__).bind(None, *args, **kwargs).arguments
    keywords = {**given, **given.get("kwargs", {})}
    keywords = {key: value for key, value in keywords.items() if key not in {"self", "kwargs"}}
    deepened: nn.Module = kind(**{**keywords, **deepen(keywords, depth)})
    return deepened


class _RecordedError(Exception):
    """Stops a builder when it calls the constructor of its network."""


@contextmanager
def _record_constructions(
    kind: type[nn.Module],
) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Record the arguments that a builder passes to a network's constructor, which does not run.

    torchvision keeps the depths of a named network inside its builder; this reads them. It is not
    thread-safe.
    """
    recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    original = kind.__init__

    def record(_: Any, *args: Any, **kwargs: Any) -> None:
        recorded.append((args, kwargs))
        raise _RecordedError

    kind.__init__ = record  # type: ignore[method-assign, assignment]  # restored below
    try:
        yield recorded
    finally:
        kind.__init__ = original  # type: ignore[method-assign]


def _resnet(given: Mapping[str, Any], depth: int) -> dict[str, Any]:
    return {"layers": [depth * blocks for blocks in given["layers"]]}


def _mobilenet_v2(given: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Deepen all stages but the first and the last, which have one block (section 3.4)."""
    table = given.get("inverted_residual_setting") or [
        # expansion, channels, blocks, stride (Sandler et al., 2018, table 2)
        [1, 16, 1, 1],
        [6, 24, 2, 2],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    inner = [[t, c, depth * n, s] for t, c, n, s in table[1:-1]]
    return {"inverted_residual_setting": [table[0], *inner, table[-1]]}


def _regnet(given: Mapping[str, Any], depth: int) -> dict[str, Any]:
    parameters = copy(given["block_params"])
    parameters.depths = [depth * blocks for blocks in parameters.depths]
    return {"block_params": parameters}


def _num_layers(key: str) -> Callable[[Mapping[str, Any], int], dict[str, Any]]:
    def deepen(given: Mapping[str, Any], depth: int) -> dict[str, Any]:
        stages = [copy(stage) for stage in given[key]]
        for stage in stages:
            stage.num_layers *= depth
        return {key: stages}

    return deepen


def _densenet(given: Mapping[str, Any], depth: int) -> dict[str, Any]:
    return {"block_config": tuple(depth * layers for layers in given["block_config"])}


_DEEPEN: dict[type[nn.Module], Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    models.ResNet: _resnet,
    models.MobileNetV2: _mobilenet_v2,
    models.RegNet: _regnet,
    models.EfficientNet: _num_layers("inverted_residual_setting"),
    models.ConvNeXt: _num_layers("block_setting"),
    models.DenseNet: _densenet,
}
"""Functions that return the deepened constructor arguments, by type of network."""
