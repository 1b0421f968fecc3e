"""Random changes to training images.

The paper's augmentation works on single Pillow images, the padded crop of small images on a batch.
Every random number depends only on the seed that is passed.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from widthopt.data.cache import channels_first
from widthopt.data.images import Integers, Pixels


RAND_AUGMENT = "rand-m9-mstd0.5"
"""timm's name of the paper's RandAugment: two operations of magnitude 9 (paper appendix A)."""

WIDEST_TRANSLATION = 0.45
"""Longest translation of RandAugment, as a part of the resolution."""

PADDING = 8
"""A padded crop adds the resolution divided by this number on each side."""


class PaperAugmentation:
    """Random resized crop, horizontal flip and RandAugment.

    Interpretation: the paper gives no parameters. The crop takes 8 to 100 % of the area at an
    aspect ratio of 3/4 to 4/3, with bilinear interpolation, as in torchvision; RandAugment fills
    with the data set's mean and draws the interpolation at random, as in timm.

    Source: paper appendix A; Cubuk et al., 2020, "RandAugment".
    """

    def __init__(self, *, resolution: int, mean: tuple[float, float, float], flip: bool) -> None:
        """Create the operations.

        Args:
            resolution: Side of the square input in pixels.
            mean: Mean of each channel, in units of full brightness.
            flip: Whether a mirrored image keeps its class.
        """
        # Imported here because timm is slow to import and most runs do not need it.
        from timm.data.auto_augment import rand_augment_transform  # noqa: PLC0415
        from torchvision.transforms import RandomResizedCrop  # noqa: PLC0415

        self._crop = RandomResizedCrop(resolution)
        self._flip = flip
        self._rand_augment = rand_augment_transform(
            RAND_AUGMENT,
            {
                "translate_const": int(resolution * WIDEST_TRANSLATION),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            },
        )

    def __call__(self, image: Image.Image, *, seed: int) -> Pixels:
        """Return the augmented image, 3 x resolution x resolution.

        Call it inside `preserve_global_rngs`: the operations draw from the global rngs.

        Args:
            image: In RGB, of any size.
            seed: Seed of all random numbers.
        """
        _seed_globals(seed)
        cropped = self._crop(image)
        if self._flip and random.random() < 0.5:  # noqa: S311, PLR2004 (not cryptographic)
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return channels_first(self._rand_augment(cropped))


@contextlib.contextmanager
def preserve_global_rngs() -> Iterator[None]:
    """Restore the states of the global rngs of Python, NumPy and torch on exit.

    timm draws from those of Python and NumPy, torchvision from torch's; none accepts a generator.
    """
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 (timm draws from it)
    cpu = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.default_generator.set_state(cpu)


@dataclass(frozen=True, eq=False)
class CropDraws:
    """The crop of each image of a batch, and whether the image is mirrored.

    Attributes:
        rows: Offset of each crop from the top of the padded image, in pixels.
        columns: Offset from the left of the padded image, in pixels.
        mirrored: Whether each crop is mirrored.
    """

    rows: Integers
    columns: Integers
    mirrored: np.ndarray[tuple[int], np.dtype[np.bool_]]

    def __getitem__(self, part: slice) -> "CropDraws":
        """Return the draws of a slice of the images."""
        return CropDraws(self.rows[part], self.columns[part], self.mirrored[part])


def crop_draws(images: int, *, padding: int, flip: bool, seed: int) -> CropDraws:
    """Draw the crops of a batch.

    Args:
        images: Images in the batch.
        padding: Pixels added on each side.
        flip: Whether images may be mirrored.
        seed: Seed of all random numbers.
    """
    generator = np.random.default_rng(seed)
    rows, columns = generator.integers(0, 2 * padding, size=(2, images), endpoint=True)
    return CropDraws(rows, columns, (generator.random(images) < 0.5) & flip)  # noqa: PLR2004


def crop_images(pixels: Pixels, draws: CropDraws, *, padding: int) -> Pixels:
    """Pad each image with black, crop it to its size at the drawn offsets, and mirror some.

    Args:
        pixels: images x 3 x side x side.
        draws: The draws of these images.
        padding: Pixels added on each side.
    """
    images, channels, height, width = pixels.shape
    shape = (images, channels, height + 2 * padding, width + 2 * padding)
    padded = np.zeros(shape, dtype=np.uint8)
    padded[:, :, padding : padding + height, padding : padding + width] = pixels
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    crops: Pixels = windows[np.arange(images), :, draws.rows, draws.columns]
    crops[draws.mirrored] = crops[draws.mirrored][..., ::-1]
    return crops


def _seed_globals(seed: int) -> None:
    """Seed the global rngs of the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (timm draws from it)
    torch.default_generator.manual_seed(seed)
