"""The projection P: from a setting to a cheap proxy of it, with one class for each axis.

A projection of several axes is the compound projection (paper section 4.5).
"""

import math
from dataclasses import dataclass, replace

from widthopt.errors import check_value
from widthopt.setting import Setting


@dataclass(frozen=True, slots=True)
class Width:
    """Set the width multiplier, a factor on every width variable (paper section 4.1)."""

    multiplier: float

    def __post_init__(self) -> None:
        check_value(
            "projection.width",
            self.multiplier,
            holds=0 < self.multiplier < math.inf,
            rule="a width multiplier is a number above 0; the paper uses 0.312 to 1.732",
        )

    def __call__(self, setting: Setting) -> Setting:
        """Return the setting with a network of this width."""
        return replace(setting, width=self.multiplier)


@dataclass(frozen=True, slots=True)
class Depth:
    """Set the depth multiplier, a factor on the blocks of every stage (paper section 4.2)."""

    multiplier: int

    def __post_init__(self) -> None:
        check_value(
            "projection.depth",
            self.multiplier,
            holds=self.multiplier >= 1,
            rule="a stage has at least one block; use an integer of at least 1",
        )

    def __call__(self, setting: Setting) -> Setting:
        """Return the setting with a network of this depth."""
        return replace(setting, depth=self.multiplier)


@dataclass(frozen=True, slots=True)
class Resolution:
    """Set the image size to ``pixels`` x ``pixels`` (paper section 4.3)."""

    pixels: int

    def __post_init__(self) -> None:
        check_value(
            "projection.resolution",
            self.pixels,
            holds=self.pixels >= 1,
            rule="an image has at least one pixel; use an integer of at least 1",
        )

    def __call__(self, setting: Setting) -> Setting:
        """Return the setting with images of this size."""
        return replace(setting, resolution=self.pixels)


@dataclass(frozen=True, slots=True)
class Fraction:
    """Set the part of the training images that is used (paper section 4.4)."""

    fraction: float

    def __post_init__(self) -> None:
        check_value(
            "projection.fraction",
            self.fraction,
            holds=0 < self.fraction <= 1,
            rule="it is a part of the training images, above 0 and at most 1; 0.1 is 10 per cent",
        )

    def __call__(self, setting: Setting) -> Setting:
        """Return the setting with this part of the training images."""
        return replace(setting, fraction=self.fraction)


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection of up to four axes; an axis that is None keeps the target's value.

    Attributes:
        width: Width multiplier of the proxy, above 0.
        depth: Depth multiplier of the proxy, from 1.
        resolution: Side of the proxy's square input, in pixels.
        fraction: Part of the training images that the search uses, in (0, 1].
    """

    width: float | None
    depth: int | None
    resolution: int | None
    fraction: float | None

    def __post_init__(self) -> None:
        self._axes()  # each axis checks its value

    def __call__(self, setting: Setting) -> Setting:
        """Return the proxy of a setting."""
        for axis in self._axes():
            setting = setting if axis is None else axis(setting)
        return setting

    def _axes(self) -> tuple[Width | Depth | Resolution | Fraction | None, ...]:
        return (
            None if self.width is None else Width(self.width),
            None if self.depth is None else Depth(self.depth),
            None if self.resolution is None else Resolution(self.resolution),
            None if self.fraction is None else Fraction(self.fraction),
        )


def nominal_saving(target: Setting, proxy: Setting) -> float:
    """Return the factor by which a search on the proxy is cheaper, by the idealised law.

    It is the product of the ratios of width^2, depth, resolution^2 and fraction. The paper's
    "320x" is (1.414/0.707)^2 * 2 * (320/160)^2 * 10.
    """
    return (
        (target.width / proxy.width) ** 2
        * (target.depth / proxy.depth)
        * (target.resolution / proxy.resolution) ** 2
        * (target.fraction / proxy.fraction)
    )
