"""Subsets of the images: stratified nested fractions, and the validation images of a search.

Each class is shuffled with the seed, and a fraction takes the first images of that order. A smaller
fraction is therefore a subset of a larger one, and all algorithms use the same images at a seed.
"""

import math
from typing import NamedTuple

import numpy as np

from widthopt.data.dataset import Dataset, classes, origin
from widthopt.data.images import MAX_NAMED, Integers
from widthopt.errors import InputError
from widthopt.seeds import derive_seed


MIN_CLASS_IMAGES = 2
"""The fewest images of a class: one for training and one for validation."""


def indices_by_class(labels: Integers, classes: int) -> list[Integers]:
    """Return the indices of the images of each class, in ascending order."""
    return [np.flatnonzero(labels == label) for label in range(classes)]


def permute(indices: Integers, seed: int, *purpose: str | int) -> Integers:
    """Return the indices in a random order that depends only on seed and purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose)).permutation(indices)


def fraction_of(images: int, fraction: float) -> int:
    """Return the number of images in a fraction of a class, with halves rounded up."""
    return math.floor(images * fraction + 0.5)


def stratify(labels: Integers, *, classes: int, fraction: float, seed: int) -> list[Integers]:
    """Draw a fraction of the images of each class.

    A smaller fraction at the same seed takes the first images of the same order.

    Args:
        labels: The class of each image.
        classes: Number of classes.
        fraction: Part of the training images, in (0, 1].
        seed: The run's seed.

    Returns:
        Indices into ``labels`` for each class, in the order in which they are drawn.
    """
    return [
        permute(indices, seed, "fraction", label)[: fraction_of(len(indices), fraction)]
        for label, indices in enumerate(indices_by_class(labels, classes))
    ]


def split_validation(drawn: list[Integers], *, validation: float) -> tuple[Integers, Integers]:
    """Split the drawn images of each class into training and validation images.

    The last images of each class are for validation. Both parts have at least one image.

    Args:
        drawn: The images of each class, at least two, in the order in which they were drawn.
        validation: Part to hold out, in (0, 1).

    Returns:
        Training indices and validation indices, both ascending.
    """
    train, validate = [], []
    for indices in drawn:
        share = max(1, fraction_of(len(indices), validation))
        count = max(1, len(indices) - share)
        train.append(indices[:count])
        validate.append(indices[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(validate))


class Counts(NamedTuple):
    """The number of images in a search or training.

    Attributes:
        batch_size: Images in each batch; the recipe's batch size, or all images if they are fewer.
        steps_per_epoch: Batches in each epoch; an incomplete last batch is dropped.
        evaluation: Images for evaluation.
    """

    batch_size: int
    steps_per_epoch: int
    evaluation: int

    @classmethod
    def of(cls, train: int, evaluation: int, *, batch_size: int) -> "Counts":
        """Return the counts for a number of training and evaluation images."""
        size = min(batch_size, train)
        return cls(size, train // size, evaluation)

    @property
    def per_epoch(self) -> int:
        """Training images in each epoch."""
        return self.batch_size * self.steps_per_epoch


class Sizes(NamedTuple):
    """The number of images in a data set.

    Attributes:
        train: Training images of each class.
        test: Test images of all classes.
    """

    train: tuple[int, ...]
    test: int

    @classmethod
    def of(cls, dataset: Dataset) -> "Sizes":
        """Count the labels, or return the published counts if the images are missing.

        Raises:
            InputError: The images are missing and the class has no ``published_counts``.
        """
        try:
            images = dataset.train()
            counts = np.bincount(images.labels, minlength=len(images.classes))
            return cls(tuple(counts.tolist()), len(dataset.test().labels))
        except InputError:
            published_counts = getattr(dataset, "published_counts", None)
            if published_counts is None:
                raise
            return cls(*published_counts())


def search_counts(sizes: Sizes, *, fraction: float, validation: float, batch_size: int) -> Counts:
    """Return the counts of `widthopt.data.search_split`, which are the same for every seed."""
    train = held = 0
    for images in sizes.train:
        drawn = fraction_of(images, fraction)
        count = max(1, drawn - max(1, fraction_of(drawn, validation)))
        train, held = train + count, held + drawn - count
    return Counts.of(train, held, batch_size=batch_size)


def target_counts(sizes: Sizes, *, batch_size: int) -> Counts:
    """Return the counts of `widthopt.data.target_split`."""
    return Counts.of(sum(sizes.train), sizes.test, batch_size=batch_size)


def check(dataset: Dataset, *, fraction: float, key: str = "projection.fraction") -> None:
    """Check the data before a run starts.

    The images are listed, and those of an image folder are read, which can take minutes for a
    large folder.

    Args:
        dataset: A choice of ``conf/dataset``.
        fraction: Part of the training images in a search.
        key: The key of the fraction, for the message.

    Raises:
        InputError: The fraction lies outside (0, 1] or leaves a class fewer than two images;
            there are fewer than two classes; images are missing or cannot be read; or
            training and test images differ in their classes.
    """
    check_fraction(dataset, fraction=fraction, key=key)
    train, test = dataset.train().classes, dataset.test().classes
    if train != test:
        differing = sorted(set(train) ^ set(test))
        raise InputError(
            f"{origin(dataset)}, but its training and test images differ in their classes "
            f"({', '.join(differing[:MAX_NAMED])}); give them the same classes"
        )


def check_fraction(dataset: Dataset, *, fraction: float, key: str) -> None:
    """Check the training images and the fraction of them that a search takes.

    Args:
        dataset: A choice of ``conf/dataset``.
        fraction: Part of the training images in a search.
        key: The key of the fraction, for the message.

    Raises:
        InputError: As for `check`, except for errors about the test images.
    """
    if not 0 < fraction <= 1:
        raise InputError(
            f"{key} is {fraction}, but it is a part of the training images; use a number "
            "above 0 and at most 1"
        )
    names = classes(dataset)
    images = np.bincount(dataset.train().labels, minlength=len(names))
    smallest = int(images.argmin())
    name, count = names[smallest], int(images[smallest])
    if count < MIN_CLASS_IMAGES:
        raise InputError(
            f"{origin(dataset)}, but class {name} has {_images(count)} for training and a class "
            "needs 2, one of them for validation; add images or remove the class"
        )
    drawn = fraction_of(count, fraction)
    if drawn < MIN_CLASS_IMAGES:
        raise InputError(
            f"{key} is {fraction}, but it leaves class {name} {_images(drawn)} of {count:,} and a "
            "class needs 2, one of them for validation; use at least "
            f"{smallest_fraction(count)}"
        )


def smallest_fraction(images: int) -> float:
    """Return the smallest fraction, with at least four decimals, that takes two images."""
    digits = max(4, math.ceil(math.log10(images)) + 1)
    unit: int = 10**digits
    return math.ceil((MIN_CLASS_IMAGES - 0.5) / images * unit) / unit


def _images(count: int) -> str:
    """Return a number of images in words."""
    return "1 image" if count == 1 else f"{count:,} images"
