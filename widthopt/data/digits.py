"""Handwritten digits of 8x8 pixels, which are part of scikit-learn."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from widthopt.data.dataset import DatasetChoice
from widthopt.data.images import ArrayImages
from widthopt.data.subsets import fraction_of, indices_by_class, permute


MAX_PIXEL = 16
"""The largest pixel value in scikit-learn's images."""

TRAIN_SHARE = 0.8
"""Part of each class in the training split; the rest is the test split."""


@dataclass(frozen=True, kw_only=True)
class Digits(DatasetChoice):
    """1,797 greyscale digits in ten classes.

    scikit-learn provides no split: four fifths of each class are training images and the rest are
    test images, the same for every seed.

    Source: Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten Digits".
    """

    IMPORTS: ClassVar[tuple[str, ...]] = ("sklearn.datasets",)

    def class_count(self) -> int:
        """Return the number of classes."""
        return 10

    def train(self) -> ArrayImages:
        """Return the training images, four fifths of each class."""
        return self._splits[0]

    def test(self) -> ArrayImages:
        """Return the test images, the remaining fifth of each class."""
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[ArrayImages, ArrayImages]:
        """Training and test images."""
        from sklearn.datasets import load_digits  # noqa: PLC0415 (slow to import)

        loaded = load_digits()
        pixels = np.rint(loaded.images * (255 / MAX_PIXEL)).astype(np.uint8)
        labels = loaded.target.astype(np.int64)
        names = tuple(str(name) for name in loaded.target_names)
        shuffled = [
            permute(indices, 0, "digits", label)
            for label, indices in enumerate(indices_by_class(labels, len(names)))
        ]
        counts = [fraction_of(len(indices), TRAIN_SHARE) for indices in shuffled]
        train = np.concatenate([i[:n] for i, n in zip(shuffled, counts, strict=True)])
        test = np.concatenate([i[n:] for i, n in zip(shuffled, counts, strict=True)])
        train.sort()
        test.sort()
        return (
            ArrayImages(labels[train], names, pixels[train]),
            ArrayImages(labels[test], names, pixels[test]),
        )
