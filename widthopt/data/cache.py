"""Training images as they lie in memory, or as they are decoded when they are asked for.

*EvalCrops* are images resized and cropped to the input's side, as evaluation sees them.
*FullImages* are uncropped images, from which random resized crops are taken. Both come out the
same whether they are kept in memory or not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from widthopt.data.dataset import CHANNELS
from widthopt.data.images import (
    ArrayImages,
    Images,
    Integers,
    Pixels,
    UnreadableError,
    map_threaded,
    side_lengths,
)


SAMPLE = 256
"""Images whose size is looked up to estimate the memory that all would take."""


class EvalCrops(Protocol):
    """Images of the input's size; called with positions, it gives images x 3 x side x side."""

    @property
    def stored_bytes(self) -> int:
        """The memory they take."""
        ...

    def __call__(self, positions: Integers) -> Pixels:
        """The images at these positions."""
        ...


class FullImages(Protocol):
    """Uncropped images, one at a time."""

    @property
    def stored_bytes(self) -> int:
        """The memory they take."""
        ...

    def __call__(self, position: int) -> Image.Image:
        """The image at this position."""
        ...


@dataclass(frozen=True, eq=False)
class CachedEvalCrops:
    """EvalCrops in memory, one array of images x 3 x side x side."""

    pixels: Pixels

    @property
    def stored_bytes(self) -> int:
        """The memory they take."""
        return self.pixels.nbytes

    def __call__(self, positions: Integers) -> Pixels:
        """The images at these positions."""
        return self.pixels[positions]


@dataclass(frozen=True, eq=False)
class DecodedSquares:
    """EvalCrops that are decoded each time."""

    images: Images
    indices: Integers
    resolution: int
    crop: float
    stored_bytes: int = 0

    def __call__(self, positions: Integers) -> Pixels:
        """The images at these positions."""
        return np.stack([self.square(int(position)) for position in positions])

    def square(self, position: int) -> Pixels:
        """The image at this position, 3 x side x side."""
        image = self.images.image(int(self.indices[position]))
        return channels_first(square(image, resolution=self.resolution, crop=self.crop))


@dataclass(frozen=True, eq=False)
class CachedFullImages:
    """FullImages in memory: all pixels in one array, so that worker processes share it.

    Attributes:
        pixels: The pixels of all images, one after another.
        ends: Where each image ends in ``pixels``.
        sizes: Width and height of each image.
    """

    pixels: Pixels
    ends: Integers
    sizes: Integers

    @property
    def stored_bytes(self) -> int:
        """The memory they take."""
        return self.pixels.nbytes

    def __call__(self, position: int) -> Image.Image:
        """The image at this position."""
        width, height = (int(side) for side in self.sizes[position])
        end = int(self.ends[position])
        pixels = self.pixels[end - width * height * CHANNELS : end]
        return Image.fromarray(pixels.reshape(height, width, CHANNELS))


@dataclass(frozen=True, eq=False)
class DecodedWholes:
    """FullImages that are decoded each time."""

    images: Images
    indices: Integers
    short_side: int | None
    stored_bytes: int = 0

    def __call__(self, position: int) -> Image.Image:
        """The image at this position."""
        return self.images.image(int(self.indices[position]), short_side=self.short_side)


def squares(
    images: Images,
    indices: Integers,
    *,
    resolution: int,
    crop: float,
    limit_bytes: float,
    progress: bool,
) -> EvalCrops:
    """Some of the images as squares, in memory where they fit.

    Args:
        images: The images of one split.
        indices: Which of them.
        resolution: Side of the squares in pixels.
        crop: Side of the central crop as a part of the resized short side.
        limit_bytes: The memory there is for them.
        progress: Show a progress bar while they are decoded.

    Raises:
        UnreadableError: Some cannot be decoded; each is named.
    """
    decoded = DecodedSquares(images, indices, resolution, crop)
    shape = (len(indices), CHANNELS, resolution, resolution)
    if int(np.prod(shape, dtype=np.int64)) > limit_bytes:
        return decoded
    if (
        isinstance(images, ArrayImages)
        and images.pixels.shape[1:] == (resolution, resolution, CHANNELS)
        and crop == 1
    ):
        return CachedEvalCrops(np.ascontiguousarray(images.pixels[indices].transpose(0, 3, 1, 2)))
    pixels = np.empty(shape, dtype=np.uint8)

    def keep(position: int) -> None:
        pixels[position] = decoded.square(position)

    _decode(keep, len(indices), progress=progress)
    return CachedEvalCrops(pixels)


def wholes(
    images: Images,
    indices: Integers,
    *,
    short_side: int | None,
    limit_bytes: float,
    progress: bool,
) -> FullImages:
    """Some of the images uncropped, in memory where they fit.

    The memory is estimated from at most 256 of them.

    Args:
        images: The images of one split.
        indices: Which of them.
        short_side: Larger images are reduced to this short side; None keeps their size.
        limit_bytes: The memory there is for them.
        progress: Show a progress bar while they are decoded.

    Raises:
        UnreadableError: Some cannot be decoded; each is named.
    """
    decoded = DecodedWholes(images, indices, short_side)
    sample = indices[:: max(1, len(indices) // SAMPLE)]
    areas = [_area(*images.size(int(index)), short_side=short_side) for index in sample]
    if sum(areas) / len(areas) * CHANNELS * len(indices) > limit_bytes:
        return decoded
    if isinstance(images, ArrayImages) and images.pixels.ndim == 4:  # noqa: PLR2004 (colour)
        size = images.size(0)
        if short_side is None or min(size) <= short_side:
            pixels = images.pixels[indices].reshape(-1)
            ends = np.arange(1, len(indices) + 1) * (size[0] * size[1] * CHANNELS)
            return CachedFullImages(pixels, ends, np.tile(size, (len(indices), 1)))
    arrays: list[Pixels] = [np.empty(0, dtype=np.uint8)] * len(indices)

    def keep(position: int) -> None:
        arrays[position] = np.asarray(decoded(position))

    _decode(keep, len(indices), progress=progress)
    sizes = np.array([array.shape[1::-1] for array in arrays], dtype=np.int64)
    return CachedFullImages(
        pixels=np.concatenate([array.ravel() for array in arrays]),
        ends=np.cumsum(sizes.prod(axis=1) * CHANNELS),
        sizes=sizes,
    )


def square(image: Image.Image, *, resolution: int, crop: float) -> Image.Image:
    """The evaluation transform: resize the short side, then crop the centre.

    Args:
        image: In RGB.
        resolution: Side of the square in pixels.
        crop: ``resolution`` as a part of the resized short side, in (0, 1].
    """
    short_side = max(resolution, round(resolution / crop))
    size = side_lengths(*image.size, short_side)
    resized = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
    if size == (resolution, resolution):
        return resized
    left, top = (round((side - resolution) / 2) for side in size)
    return resized.crop((left, top, left + resolution, top + resolution))


def channels_first(image: Image.Image) -> Pixels:
    """The image's pixels as 3 x height x width."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _area(width: int, height: int, *, short_side: int | None) -> int:
    """Pixels of an image after `reduce_image`."""
    if short_side is not None and min(width, height) > short_side:
        width, height = side_lengths(width, height, short_side)
    return width * height


def _decode(keep: Callable[[int], None], count: int, *, progress: bool) -> None:
    """Call ``keep`` for every position, in threads, and name all that cannot be decoded."""

    def attempt(position: int) -> UnreadableError | None:
        try:
            keep(position)
        except UnreadableError as error:
            return error
        return None

    outcomes = map_threaded(attempt, range(count), progress="Decoding images" if progress else None)
    errors = [error for error in outcomes if error is not None]
    if errors:
        raise errors[0].images.unreadable([index for e in errors for index in e.indices])
