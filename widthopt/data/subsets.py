"""Which images: stratified nested fractions, and the validation share of a search.

Each class is shuffled once for a seed. A fraction is the beginning of that order, so a
smaller fraction lies within a larger one, and all algorithms at one seed see the same.
"""

import math
from typing import NamedTuple

import numpy as np

from widthopt.data.dataset import Dataset, classes, origin
from widthopt.data.images import NAMED, Integers
from widthopt.errors import InputError
from widthopt.seeds import derived_seed


LEAST = 2
"""Images a class needs: one to train on and one to hold out."""


def members(labels: Integers, classes: int) -> list[Integers]:
    """The indices of the images of each class, in ascending order."""
    return [np.flatnonzero(labels == label) for label in range(classes)]


def permute(indices: Integers, seed: int, *purpose: str | int) -> Integers:
    """The indices in the random order that (seed, purpose) gives."""
    return np.random.default_rng(derived_seed(seed, *purpose)).permutation(indices)


def fraction_of(images: int, fraction: float) -> int:
    """How many of a class's images a fraction takes: to the nearest, halves up."""
    return math.floor(images * fraction + 0.5)


def stratify(labels: Integers, *, classes: int, fraction: float, seed: int) -> list[Integers]:
    """The images of each class that a fraction takes, in the order they are drawn.

    A smaller fraction at the same seed takes the beginning of the same order.

    Args:
        labels: The class of each image.
        classes: Number of classes.
        fraction: Part of the training images, in (0, 1].
        seed: The run's seed.

    Returns:
        Indices into ``labels``, for each class.
    """
    return [
        permute(of_class, seed, "fraction", label)[: fraction_of(len(of_class), fraction)]
        for label, of_class in enumerate(members(labels, classes))
    ]


def held_out(drawn: list[Integers], *, validation: float) -> tuple[Integers, Integers]:
    """Split the drawn images of each class into those that train and those held out.

    Each class gives the last of its images, at least one, and keeps at least one.

    Args:
        drawn: Images of each class, in the order they were drawn; two or more in each.
        validation: Part to hold out, in (0, 1).

    Returns:
        Indices that train and indices held out, both ascending.
    """
    train, validate = [], []
    for of_class in drawn:
        share = max(1, fraction_of(len(of_class), validation))
        kept = max(1, len(of_class) - share)
        train.append(of_class[:kept])
        validate.append(of_class[kept:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(validate))


class Counts(NamedTuple):
    """How many images a search or training sees.

    Attributes:
        batch_size: Images in each batch; all images where they are fewer than asked for.
        steps_per_epoch: Batches in each epoch; what is left over is dropped.
        evaluation: Images that are evaluated on.
    """

    batch_size: int
    steps_per_epoch: int
    evaluation: int

    @classmethod
    def of(cls, train: int, evaluation: int, *, batch_size: int) -> "Counts":
        """The counts for so many training images at this batch size."""
        size = min(batch_size, train)
        return cls(size, train // size, evaluation)

    @property
    def per_epoch(self) -> int:
        """Training images seen in one epoch."""
        return self.batch_size * self.steps_per_epoch


class Sizes(NamedTuple):
    """How many images a data set has.

    Attributes:
        train: Training images of each class.
        test: Test images of all classes.
    """

    train: tuple[int, ...]
    test: int

    @classmethod
    def of(cls, dataset: Dataset) -> "Sizes":
        """From the labels; where there are no images, as published, to plan with.

        Raises:
            InputError: There are no images, and nothing is published about them.
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
    """The counts of `widthopt.data.search_split`, which are the same for every seed."""
    train = held = 0
    for images in sizes.train:
        drawn = fraction_of(images, fraction)
        kept = max(1, drawn - max(1, fraction_of(drawn, validation)))
        train, held = train + kept, held + drawn - kept
    return Counts.of(train, held, batch_size=batch_size)


def target_counts(sizes: Sizes, *, batch_size: int) -> Counts:
    """The counts of `widthopt.data.target_split`."""
    return Counts.of(sum(sizes.train), sizes.test, batch_size=batch_size)


def check(dataset: Dataset, *, fraction: float, key: str = "projection.fraction") -> None:
    """Raise all that can be known to be wrong with the data before work starts.

    The images are looked up, and those of an image folder are read, so this can take a while
    for a large one.

    Args:
        dataset: A choice of ``conf/dataset``.
        fraction: Part of the training images that a search sees.
        key: The key that the fraction was given with, for the message.

    Raises:
        InputError: The fraction lies outside (0, 1] or leaves a class fewer than two images;
            there are fewer than two classes; images are missing or cannot be read; or
            training and test images differ in their classes.
    """
    check_fraction(dataset, fraction=fraction, key=key)
    names, tested = dataset.train().classes, dataset.test().classes
    if tested != names:
        differing = sorted(set(names) ^ set(tested))
        raise InputError(
            f"{origin(dataset)}, but its training and test images differ in their classes "
            f"({', '.join(differing[:NAMED])}); give both the same classes"
        )


def check_fraction(dataset: Dataset, *, fraction: float, key: str) -> None:
    """The part of `check` that concerns the training images alone.

    Args:
        dataset: A choice of ``conf/dataset``.
        fraction: Part of the training images that a search sees.
        key: The key that the fraction was given with, for the message.

    Raises:
        InputError: As for `check`, but for what concerns the test images.
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
    if count < LEAST:
        raise InputError(
            f"{origin(dataset)}, but class {name} has {_count_images(count)} to train on and a "
            "class needs 2, one of them for validation; add images or leave the class out"
        )
    left = fraction_of(count, fraction)
    if left < LEAST:
        raise InputError(
            f"{key} is {fraction}, but class {name} is left with {_count_images(left)} of "
            f"{count:,} and a class needs 2, one of them for validation; use "
            f"{smallest_fraction(count)} or more"
        )


def smallest_fraction(images: int) -> float:
    """The smallest fraction, to four decimals or more, that takes two of a class's images."""
    digits = max(4, math.ceil(math.log10(images)) + 1)
    unit: int = 10**digits
    return math.ceil((LEAST - 0.5) / images * unit) / unit


def _count_images(images: int) -> str:
    """A number of images in words."""
    return "1 image" if images == 1 else f"{images:,} images"
