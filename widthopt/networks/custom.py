"""A custom network, given by the dotted name of the function or class that builds it."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from widthopt.errors import AxisError, InputError


@dataclass(frozen=True)
class CustomNetwork:
    """A network built by any factory: ``network=custom network.factory=my_module.my_network``.

    Attributes:
        name: The network's name in records and figures.
        factory: Dotted name of a callable that takes ``num_classes`` and returns a module.
            If it also takes ``depth``, it gets the depth multiplier.
        arguments: Further arguments of the factory, by name.
        stages_in: Names of the modules whose children are the blocks of one stage each, for
            extrapolation over depth.
        rules_for: Tracing rules: dotted names of module types or functions, each with the dotted
            name of its rule.
    """

    name: str
    factory: str
    arguments: Mapping[str, Any]
    stages_in: Sequence[str]
    rules_for: Mapping[str, str]

    def build(self, *, depth: int, classes: int) -> nn.Module:
        """See `widthopt.setting.Network`."""
        factory = _import(self.factory, "network.factory")
        arguments = {"num_classes": classes, **self.arguments}
        if "depth" in inspect.signature(factory).parameters:
            arguments["depth"] = depth
        elif depth != 1:
            raise AxisError(
                "depth",
                f"{depth}, but {self.factory} takes no argument `depth`; add the argument, or use "
                "depth 1",
            )
        try:
            model = factory(**arguments)
        except TypeError as error:
            raise InputError(
                f"network.factory is {self.factory}, but it cannot be called with "
                f"{', '.join(arguments)} ({error}); make it accept num_classes and "
                "network.arguments"
            ) from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"network.factory is {self.factory}, but it returned a value of type "
                f"{type(model).__name__}; return a torch.nn.Module"
            )
        return model

    def stages(self, model: nn.Module) -> list[tuple[str, list[str]]]:
        """See `widthopt.setting.Network`."""
        modules = dict(model.named_modules())
        unknown = [stage for stage in self.stages_in if stage not in modules]
        if unknown:
            raise InputError(
                f"network.stages_in is {', '.join(self.stages_in)}, but {self.factory} has no "
                f"module `{unknown[0]}`; name modules whose children are blocks"
            )
        return [
            (stage, [f"{stage}.{name}" for name, _ in modules[stage].named_children()])
            for stage in self.stages_in
        ]

    @property
    def rules(self) -> dict[Any, Callable[..., Any]]:
        """The tracing rules, imported by their names."""
        return {
            _import(operation, "network.rules_for"): _import(rule, "network.rules_for")
            for operation, rule in self.rules_for.items()
        }


def _import(name: str, key: str) -> Any:
    """Import the object with a dotted name."""
    module, _, attribute = name.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", module):
        raise InputError(
            f"{key} is {name}, but it must be a dotted name such as my_module.my_network; give the "
            "module too, which may be in the current folder"
        )
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise InputError(
            f"{key} is {name}, but {module} cannot be imported ({error}); start in the folder "
            "that holds it, or install it"
        ) from error
    except AttributeError as error:
        raise InputError(
            f"{key} is {name}, but {module} has no `{attribute}`; check the spelling"
        ) from error
