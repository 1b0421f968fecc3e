"""The projection P: from a setting to a cheap proxy of it, one small value for each axis.

Several at once are the compound projection (paper section 4.5).
"""

import math
from dataclasses import dataclass, replace

from widthopt.errors import InputError
from widthopt.setting import Setting


@dataclass(frozen=True, slots=True)
class Width:
    """Every width variable times ``multiplier`` (paper section 4.1)."""

    multiplier: float

    def __post_init__(self) -> None:
        if not self.multiplier > 0 or math.isinf(self.multiplier):
            raise InputError(
                f"projection.width is {self.multiplier:g}, but a width multiplier is a number "
                "above 0; the paper uses 0.312 to 1.732"
            )

    def __call__(self, setting: Setting) -> Setting:
        """The setting with a network of this width."""
        return replace(setting, width=self.multiplier)


@dataclass(frozen=True, slots=True)
class Depth:
    """Every stage with its blocks times ``multiplier`` (paper section 4.2)."""

    multiplier: int

    def __post_init__(self) -> None:
        if self.multiplier < 1:
            raise InputError(
                f"projection.depth is {self.multiplier}, but a stage needs at least one block; "
                "use a whole number from 1 up"
            )

    def __call__(self, setting: Setting) -> Setting:
        """The setting with a network of this depth."""
        return replace(setting, depth=self.multiplier)


@dataclass(frozen=True, slots=True)
class Resolution:
    """Images of ``pixels`` x ``pixels`` (paper section 4.3)."""

    pixels: int

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise InputError(
                f"projection.resolution is {self.pixels}, but an image has at least one pixel; "
                "use a whole number from 1 up"
            )

    def __call__(self, setting: Setting) -> Setting:
        """The setting with images of this size."""
        return replace(setting, resolution=self.pixels)


@dataclass(frozen=True, slots=True)
class Fraction:
    """This part of the training images (paper section 4.4)."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(
                f"projection.fraction is {self.fraction:g}, but it is a part of the training "
                "images, above 0 and at most 1; 0.1 is ten per cent"
            )

    def __call__(self, setting: Setting) -> Setting:
        """The setting with fewer training images."""
        return replace(setting, fraction=self.fraction)


@dataclass(frozen=True, slots=True)
class Projection:
    """The four axes together; an axis that is None stays as the target has it."""

    width: float | None
    depth: int | None
    resolution: int | None
    fraction: float | None

    def __post_init__(self) -> None:
        self._axes()  # each checks its own value

    def __call__(self, setting: Setting) -> Setting:
        """The proxy of a setting."""
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
    """How many times cheaper a search on the proxy is, by the idealised law.

    The product of the ratios width^2, depth, resolution^2 and fraction; the paper's "320x"
    is (1.414/0.707)^2 * 2 * (320/160)^2 * 10 (design, section 9).
    """
    return (
        (target.width / proxy.width) ** 2
        * (target.depth / proxy.depth)
        * (target.resolution / proxy.resolution) ** 2
        * (target.fraction / proxy.fraction)
    )
