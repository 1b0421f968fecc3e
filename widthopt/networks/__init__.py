"""Networks at width multiplier 1: torchvision's by name, and any factory of a user's own.

A network says how it is built at a depth, where its stages and blocks lie, and how its
weights start. Widths are not its business: `widthopt.surgery` sizes any network.
"""

from widthopt.networks.custom import CustomNetwork
from widthopt.networks.initialisation import initialise
from widthopt.networks.zoo import TorchvisionNetwork


__all__ = ["CustomNetwork", "TorchvisionNetwork", "initialise"]
