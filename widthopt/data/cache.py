"""Decoded images: cached in memory if they fit, else decoded on each access.

`EvalCrops` are images resized and cropped to the input size, as for evaluation. `FullImages` are
uncropped images, from which random resized crops are taken. The cache changes no pixel.
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
"""Number of images that the memory estimate is based on."""


class EvalCrops(Protocol):
    """Images resized and cropped to the input size."""

    @property
    def stored_bytes(self) -> int:
        """Size of the cache in bytes."""
        ...

    def __call__(self, positions: Integers) -> Pixels:
        """Return the images at these positions, images x 3 x side x side."""
        ...


class FullImages(Protocol):
    """Uncropped images."""

    @property
    def stored_bytes(self) -> int:
        """Size of the cache in bytes."""
        ...

    def __call__(self, position: int) -> Image.Image:
        """Return the image at this position."""
        ...


@dataclass(frozen=True, eq=False)
class CachedEvalCrops:
    """EvalCrops in memory, one array of images x 3 x side x side."""

    pixels: Pixels

    @property
    def stored_bytes(self) -> int:
        """Size of the cache in bytes."""
        return self.pixels.nbytes

    def __call__(self, positions: Integers) -> Pixels:
        """Return the images at these positions."""
        return self.pixels[positions]


@dataclass(frozen=True, eq=False)
class DecodedEvalCrops:
    """EvalCrops that are decoded on each access."""

    images: Images
    indices: Integers
    resolution: int
    crop: float
    stored_bytes: int = 0

    def __call__(self, positions: Integers) -> Pixels:
        """Return the images at these positions."""
        return np.stack([self.decode(int(position)) for position in positions])

    def decode(self, position: int) -> Pixels:
        """Return the image at this position, 3 x side x side."""
        image = self.images.image(int(self.indices[position]))
        return channels_first(eval_crop(image, resolution=self.resolution, crop=self.crop))


@dataclass(frozen=True, eq=False)
class CachedFullImages:
    """FullImages in memory: all pixels in one array, so that worker processes share it.

    Attributes:
        pixels: The pixels of all images, one after another.
        ends: The end of each image in ``pixels``.
        sizes: Width and height of each image.
    """

    pixels: Pixels
    ends: Integers
    sizes: Integers

    @property
    def stored_bytes(self) -> int:
        """Size of the cache in bytes."""
        return self.pixels.nbytes

    def __call__(self, position: int) -> Image.Image:
        """Return the image at this position."""
        width, height = (int(side) for side in self.sizes[position])
        end = int(self.ends[position])
        pixels = self.pixels[end - width * height * CHANNELS : end]
        return Image.fromarray(pixels.reshape(height, width, CHANNELS))


@dataclass(frozen=True, eq=False)
class DecodedFullImages:
    """FullImages that are decoded on each access."""

    images: Images
    indices: Integers
    short_side: int | None
    stored_bytes: int = 0

    def __call__(self, position: int) -> Image.Image:
        """Return the image at this position."""
        return self.images.image(int(self.indices[position]), short_side=self.short_side)


def load_eval_crops(
    images: Images,
    indices: Integers,
    *,
    resolution: int,
    crop: float,
    limit_bytes: float,
    progress: bool,
) -> EvalCrops:
    """Load some of the images resized and cropped, into memory if they fit.

    Args:
        images: The images of one split.
        indices: The images to load.
        resolution: Side of the cropped images in pixels.
        crop: Side of the central crop as a part of the resized short side.
        limit_bytes: The memory that they may take.
        progress: Whether to show a progress bar.

    Raises:
        UnreadableError: Some cannot be decoded; the message names them.
    """
    decoded = DecodedEvalCrops(images, indices, resolution, crop)
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

    def store(position: int) -> None:
        pixels[position] = decoded.decode(position)

    _decode_all(store, len(indices), progress=progress)
    return CachedEvalCrops(pixels)


def load_full_images(
    images: Images,
    indices: Integers,
    *,
    short_side: int | None,
    limit_bytes: float,
    progress: bool,
) -> FullImages:
    """Load some of the images uncropped, into memory if they fit.

    The memory is estimated from a sample of about `SAMPLE` images.

    Args:
        images: The images of one split.
        indices: The images to load.
        short_side: Larger images are reduced to this short side; None keeps their size.
        limit_bytes: The memory that they may take.
        progress: Whether to show a progress bar.

    Raises:
        UnreadableError: Some cannot be decoded; the message names them.
    """
    decoded = DecodedFullImages(images, indices, short_side)
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

    def store(position: int) -> None:
        arrays[position] = np.asarray(decoded(position))

    _decode_all(store, len(indices), progress=progress)
    sizes = np.array([array.shape[1::-1] for array in arrays], dtype=np.int64)
    return CachedFullImages(
        pixels=np.concatenate([array.ravel() for array in arrays]),
        ends=np.cumsum(sizes.prod(axis=1) * CHANNELS),
        sizes=sizes,
    )


def eval_crop(image: Image.Image, *, resolution: int, crop: float) -> Image.Image:
    """Return the image as for evaluation: short side resized, centre cropped.

    Args:
        image: In RGB.
        resolution: Side of the crop in pixels.
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
    """Return the pixels of an image as 3 x height x width."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _area(width: int, height: int, *, short_side: int | None) -> int:
    """Return the number of pixels of an image after `reduce_image`."""
    if short_side is not None and min(width, height) > short_side:
        width, height = side_lengths(width, height, short_side)
    return width * height


def _decode_all(store: Callable[[int], None], count: int, *, progress: bool) -> None:
    """Call ``store`` for every position, in threads.

    Raises:
        UnreadableError: Some images cannot be decoded; the message names them.
    """

    def attempt(position: int) -> UnreadableError | None:
        try:
            store(position)
        except UnreadableError as error:
            return error
        return None

    outcomes = map_threaded(attempt, range(count), progress="Decoding images" if progress else None)
    errors = [error for error in outcomes if error is not None]
    if errors:
        raise errors[0].images.unreadable_error([index for e in errors for index in e.indices])
