"""Random changes to training images.

The paper's work on one Pillow image at a time, the padded crop of small images on a whole
batch at once. Every draw follows from the seed that is handed in.
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
"""Longest translation in pixels as a part of the resolution, where an operation asks for it."""

PADDING = 8
"""A padded crop adds one part in this many of the resolution on each side."""


class PaperAugmentation:
    """Random resized crop, horizontal flip and RandAugment.

    Reading: the paper names these without their parameters. The crop takes 8 to 100 % of the
    area at an aspect ratio of 3/4 to 4/3, bilinear, as torchvision has it; RandAugment fills
    with the data set's mean and interpolates at random, as timm has it.

    Source: paper appendix A; Cubuk et al., 2020, "RandAugment".
    """

    def __init__(self, *, resolution: int, mean: tuple[float, float, float], flip: bool) -> None:
        """Prepare the operations.

        Args:
            resolution: Side of the square input in pixels.
            mean: Mean of each channel, in units of full brightness.
            flip: Whether a mirrored image keeps its class.
        """
        # Imported here: timm takes longer to import than all the rest, and most runs need none.
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
        """The changed image, 3 x resolution x resolution.

        Call it inside `preserve_global_rngs`: the operations draw from the global generators.

        Args:
            image: In RGB, of any size.
            seed: All draws follow from it.
        """
        _seed_globals(seed)
        cropped = self._crop(image)
        if self._flip and random.random() < 0.5:  # noqa: S311, PLR2004 (a coin, and no secret)
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return channels_first(self._rand_augment(cropped))


@contextlib.contextmanager
def preserve_global_rngs() -> Iterator[None]:
    """Give the global generators of Python, numpy and torch back as they were.

    timm draws from Python's and numpy's, torchvision from torch's; none takes a generator.
    """
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 (what timm draws from)
    cpu = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.default_generator.set_state(cpu)


@dataclass(frozen=True, eq=False)
class CropDraws:
    """Where each image of a batch is cropped, and whether it is mirrored.

    Attributes:
        rows: Offset of the crop from the top of the padded image, in pixels.
        columns: Offset from its left, in pixels.
        mirrored: Whether the crop is mirrored.
    """

    rows: Integers
    columns: Integers
    mirrored: np.ndarray[tuple[int], np.dtype[np.bool_]]

    def __getitem__(self, part: slice) -> "CropDraws":
        """The draws of some of the images."""
        return CropDraws(self.rows[part], self.columns[part], self.mirrored[part])


def crop_draws(images: int, *, padding: int, flip: bool, seed: int) -> CropDraws:
    """Draw the crops of a batch.

    Args:
        images: Images in the batch.
        padding: Pixels added on each side.
        flip: Whether a mirrored image keeps its class; else nothing is mirrored.
        seed: All draws follow from it.
    """
    generator = np.random.default_rng(seed)
    rows, columns = generator.integers(0, 2 * padding, size=(2, images), endpoint=True)
    return CropDraws(rows, columns, (generator.random(images) < 0.5) & flip)  # noqa: PLR2004


def crop_images(pixels: Pixels, draws: CropDraws, *, padding: int) -> Pixels:
    """Pad each image with black, crop it to its old size where it was drawn, mirror some.

    Args:
        pixels: images x 3 x side x side.
        draws: One for each image.
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
    """Seed the global generators, on the processor only."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (what timm draws from)
    torch.default_generator.manual_seed(seed)
