"""What every choice of ``conf/dataset`` says about its images, and the checks on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from widthopt.data.images import Images
from widthopt.errors import InputError, check_value


CHANNELS = 3
"""Red, green and blue; greyscale images are converted."""


class Dataset(Protocol):
    """A data set: ``conf/dataset`` chooses one by its ``_target_``.

    One of your own needs these attributes and two methods; `DatasetChoice` checks them.
    """

    @property
    def name(self) -> str:
        """The data set's name in records, figures and messages."""
        ...

    @property
    def resolution(self) -> int:
        """Side of the square input in pixels where nothing else is asked for."""
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
        """Side of the central crop at evaluation as a part of the short side, in (0, 1]."""
        ...

    @property
    def flip(self) -> bool:
        """Whether a mirrored image keeps its class."""
        ...

    @property
    def train_scale(self) -> float | None:
        """Short side of the images that random resized crops are taken from.

        As a multiple of the resolution; None keeps every image at its own size.
        """
        ...

    @property
    def validation(self) -> float:
        """Part of a search's training images that is held out for its validation."""
        ...

    @property
    def memory_limit_gb(self) -> float:
        """Decoded images are kept in memory up to this many gigabytes (10^9 bytes)."""
        ...

    def class_count(self) -> int:
        """How many classes there are."""
        ...

    def train(self) -> Images:
        """The training images.

        Raises:
            InputError: They are missing or broken.
        """
        ...

    def test(self) -> Images:
        """The images that final accuracy is measured on; no search sees them.

        Raises:
            InputError: They are missing or broken.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """The part that all choices of ``conf/dataset`` share; default values live there.

    Attributes:
        name: The data set's name in records, figures and messages.
        resolution: Side of the square input in pixels where nothing else is asked for.
        mean: Mean of each of three channels, in units of full brightness.
        std: Standard deviation of each of three channels, in the same units.
        crop: Side of the central crop at evaluation as a part of the short side, in (0, 1].
        flip: Whether a mirrored image keeps its class.
        train_scale: Short side of the images that random resized crops are taken from, as a
            multiple of the resolution; larger images are reduced to it once. None keeps
            every image at its own size.
        validation: Part of a search's training images held out for its validation, in (0, 1).
        memory_limit_gb: Decoded images are kept in memory up to this many gigabytes (10^9
            bytes); 0 decodes each image whenever it is needed. Changes no result.
    """

    NON_IDENTITY_KEYS: ClassVar[frozenset[str]] = frozenset({"memory_limit_gb", "resolution"})
    """Fields that change no result, so that they are no part of a run's name.

    The resolution is that of the target where nobody says another, and has its place there.
    """

    IMPORTS: ClassVar[tuple[str, ...]] = ()
    """Modules that its images need, beside this one, and that take long to import."""

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
        for key in ("mean", "std"):  # a configuration hands over lists
            object.__setattr__(self, key, _per_channel(f"dataset.{key}", getattr(self, key)))
        check_value(
            "dataset.resolution",
            self.resolution,
            holds=self.resolution >= 1,
            rule="an image has a side of at least one pixel; use a whole number from 1 up",
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
            rule="it is a size; use 0 to keep nothing in memory, or a number above",
        )


def classes(dataset: Dataset) -> tuple[str, ...]:
    """The names of the classes, in the order of the labels.

    Args:
        dataset: A choice of ``conf/dataset``; its training images are looked up.

    Raises:
        InputError: There are fewer than two, or the training images are missing or broken.
    """
    names = dataset.train().classes
    if len(names) < 2:  # noqa: PLR2004 (two classes are the least there is to tell apart)
        found = ", ".join(names) or "none"
        raise InputError(
            f"{origin(dataset)}, but it has fewer than two classes ({found}) and there is "
            "nothing to tell apart; use a data set of two classes or more"
        )
    return names


def origin(dataset: Dataset) -> str:
    """The key that says where a data set comes from, and its value, as a message begins."""
    root = getattr(dataset, "root", None)
    return f"dataset.name is {dataset.name}" if root is None else f"dataset.root is {root}"


def _per_channel(key: str, values: Sequence[float]) -> tuple[float, ...]:
    """The values as a tuple of three numbers."""
    numbers = tuple(values)
    check_value(
        key,
        list(numbers),
        holds=len(numbers) == CHANNELS,
        rule="images have three channels; give one number for each of red, green and blue",
    )
    return numbers
