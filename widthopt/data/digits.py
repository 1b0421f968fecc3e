"""Handwritten digits, 8x8 pixels, that come with scikit-learn: no download, no folder."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from widthopt.data.dataset import DatasetChoice
from widthopt.data.images import ArrayImages
from widthopt.data.subsets import fraction_of, members, permute


BRIGHTEST = 16
"""The largest value of a pixel as scikit-learn stores it."""

TRAIN = 0.8
"""Part of each class that trains; the rest is the test split."""


@dataclass(frozen=True, kw_only=True)
class Digits(DatasetChoice):
    """1,797 greyscale digits in ten classes.

    scikit-learn has one set of images and no split, so four fifths of each class train and
    the rest test, the same for every seed.

    Source: Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten Digits".
    """

    IMPORTS: ClassVar[tuple[str, ...]] = ("sklearn.datasets",)

    def class_count(self) -> int:
        """How many classes there are."""
        return 10

    def train(self) -> ArrayImages:
        """The training images: four fifths of each class."""
        return self._splits[0]

    def test(self) -> ArrayImages:
        """The test images: the other fifth."""
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[ArrayImages, ArrayImages]:
        """Training and test images."""
        from sklearn.datasets import load_digits  # noqa: PLC0415 (takes a second to import)

        loaded = load_digits()
        pixels = np.rint(loaded.images * (255 / BRIGHTEST)).astype(np.uint8)
        labels = loaded.target.astype(np.int64)
        names = tuple(str(name) for name in loaded.target_names)
        shuffled = [
            permute(of_class, 0, "digits", i)
            for i, of_class in enumerate(members(labels, len(names)))
        ]
        kept = [fraction_of(len(of_class), TRAIN) for of_class in shuffled]
        train = np.concatenate([c[:k] for c, k in zip(shuffled, kept, strict=True)])
        test = np.concatenate([c[k:] for c, k in zip(shuffled, kept, strict=True)])
        train.sort()
        test.sort()
        return (
            ArrayImages(labels[train], names, pixels[train]),
            ArrayImages(labels[test], names, pixels[test]),
        )
