"""Networks at width multiplier 1: torchvision's by name, and any factory of a user's own.

A network says how it is built at a depth, where its stages and blocks lie, and how its
weights start. Widths are not its business: `widthopt.networks.resize` sizes any network.
"""

from typing import TYPE_CHECKING, Any

import widthopt.networks.torchvision_operators  # noqa: F401  (before torchvision, which a user's network may import)


# isort: split
from widthopt.networks.custom import CustomNetwork
from widthopt.networks.initialisation import initialise


if TYPE_CHECKING:
    from widthopt.networks.zoo import TorchvisionNetwork


__all__ = ["CustomNetwork", "TorchvisionNetwork", "initialise"]


def __getattr__(name: str) -> Any:
    """Import torchvision's networks where they are asked for.

    torchvision takes as long to import as torch, and most commands and all networks of a user's own
    do without.
    """
    if name == "TorchvisionNetwork":
        from widthopt.networks.zoo import TorchvisionNetwork  # noqa: PLC0415 (see above)

        return TorchvisionNetwork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
