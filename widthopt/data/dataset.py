"""The interface and the fields that all choices of ``conf/dataset`` share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from widthopt.data.images import Images
from widthopt.errors import InputError, check_value


CHANNELS = 3
"""Red, green and blue; greyscale images are converted to RGB."""


class Dataset(Protocol):
    """A data set; ``_target_`` in ``conf/dataset`` names its class.

    A class that implements it can inherit the attributes and their checks from `DatasetChoice`.
    """

    @property
    def name(self) -> str:
        """The data set's name in records, figures and messages."""
        ...

    @property
    def resolution(self) -> int:
        """Default side of the square input, in pixels."""
        ...

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel, in units of full brightness."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel, in units of full brightness."""
        ...

    @property
    def crop(self) -> float:
        """Side of the central crop at evaluation, as a part of the short side, in (0, 1]."""
        ...

    @property
    def flip(self) -> bool:
        """Whether a mirrored image keeps its class, so that augmentation may mirror images."""
        ...

    @property
    def train_scale(self) -> float | None:
        """Short side of the images that random resized crops are taken from.

        It is a multiple of the resolution; None keeps every image at its own size.
        """
        ...

    @property
    def validation(self) -> float:
        """Part of a search's training images that is held out for validation, in (0, 1)."""
        ...

    @property
    def memory_limit_gb(self) -> float:
        """Memory for decoded images, in gigabytes (10^9 bytes)."""
        ...

    def class_count(self) -> int:
        """Return the number of classes."""
        ...

    def train(self) -> Images:
        """Return the training images.

        Raises:
            InputError: Images are missing or cannot be read.
        """
        ...

    def test(self) -> Images:
        """Return the test images, which final accuracy is measured on; no search uses them.

        Raises:
            InputError: Images are missing or cannot be read.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """The fields that all choices of ``conf/dataset`` share; their defaults are in ``conf/``.

    Attributes:
        name: The data set's name in records, figures and messages.
        resolution: Default side of the square input, in pixels.
        mean: Mean of each of the three channels, in units of full brightness.
        std: Standard deviation of each of the three channels, in the same units.
        crop: Side of the central crop at evaluation, as a part of the short side, in (0, 1].
        flip: Whether a mirrored image keeps its class, so that augmentation may mirror images.
        train_scale: Short side of the images that random resized crops are taken from, as a
            multiple of the resolution; larger images are reduced to it once. None keeps
            every image at its own size.
        validation: Part of a search's training images that is held out for validation, in (0, 1).
        memory_limit_gb: Memory for decoded images, in gigabytes (10^9 bytes); 0 decodes each
            image whenever it is needed. Does not change results.
    """

    NON_IDENTITY_KEYS: ClassVar[frozenset[str]] = frozenset({"memory_limit_gb", "resolution"})
    """Fields that are not part of a run's identity because they do not change results.

    The resolution only sets the default of ``target.resolution``, which is part of the identity.
    """

    IMPORTS: ClassVar[tuple[str, ...]] = ()
    """Modules that the images need and that are slow to import."""

    name: str
    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float
    flip: bool
    train_scale: float | None
    validation: float
    memory_limit_gb: float

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: A value lies outside its range.
        """
        for key in ("mean", "std"):  # the configuration passes lists
            object.__setattr__(self, key, _per_channel(f"dataset.{key}", getattr(self, key)))
        check_value(
            "dataset.resolution",
            self.resolution,
            holds=self.resolution >= 1,
            rule="an image has at least one pixel; use an integer of at least 1",
        )
        check_value(
            "dataset.std",
            list(self.std),
            holds=min(self.std) > 0,
            rule="images are divided by it; use numbers above 0",
        )
        check_value(
            "dataset.crop",
            self.crop,
            holds=0 < self.crop <= 1,
            rule="it is a part of the short side; use a number above 0 and at most 1",
        )
        check_value(
            "dataset.train_scale",
            self.train_scale,
            holds=self.train_scale is None or 0 < self.train_scale < math.inf,
            rule="it is a multiple of the resolution; use a number above 0, or null",
        )
        check_value(
            "dataset.validation",
            self.validation,
            holds=0 < self.validation < 1,
            rule="it is a part of the training images; use a number between 0 and 1",
        )
        check_value(
            "dataset.memory_limit_gb",
            self.memory_limit_gb,
            holds=self.memory_limit_gb >= 0,
            rule="it is a size; use 0 to cache no images, or a number above 0",
        )


def classes(dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the classes, in the order of the labels.

    Args:
        dataset: A choice of ``conf/dataset``; its training images are listed.

    Raises:
        InputError: There are fewer than two, or training images are missing or cannot be read.
    """
    names = dataset.train().classes
    if len(names) < 2:  # noqa: PLR2004 (a classifier needs two classes)
        listed = ", ".join(names) or "none"
        raise InputError(
            f"{origin(dataset)}, but it has fewer than two classes ({listed}) and a "
            "classifier needs two; use a data set of two classes or more"
        )
    return names


def origin(dataset: Dataset) -> str:
    """Return the beginning of a message: the key that identifies the data set, and its value."""
    root = getattr(dataset, "root", None)
    return f"dataset.name is {dataset.name}" if root is None else f"dataset.root is {root}"


def _per_channel(key: str, values: Sequence[float]) -> tuple[float, ...]:
    """Return the values as a tuple of three numbers."""
    numbers = tuple(values)
    check_value(
        key,
        list(numbers),
        holds=len(numbers) == CHANNELS,
        rule="images have three channels; give one number for each of red, green and blue",
    )
    return numbers
