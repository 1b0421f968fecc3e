"""Networks at width multiplier 1: torchvision's by name, and custom ones built by a factory.

A network defines how it is built at a depth, and where its stages and blocks are.
`widthopt.networks.resize` gives any network its widths.
"""

from typing import TYPE_CHECKING, Any

from widthopt.networks.custom import CustomNetwork
from widthopt.networks.initialisation import initialise


if TYPE_CHECKING:
    from widthopt.networks.zoo import TorchvisionNetwork


__all__ = ["CustomNetwork", "TorchvisionNetwork", "initialise"]


def __getattr__(name: str) -> Any:
    """Import torchvision's networks when they are first used.

    torchvision takes as long to import as torch; most commands and all custom networks do not
    need it.
    """
    if name == "TorchvisionNetwork":
        from widthopt.networks.zoo import TorchvisionNetwork  # noqa: PLC0415 (see above)

        return TorchvisionNetwork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
