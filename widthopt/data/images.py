"""The labelled images of a data set, before any transform.

An image is a Pillow image in RGB at its own size, from an array or from a file.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from widthopt.errors import InputError


Integers: TypeAlias = NDArray[np.int64]
"""Labels, or indices of images."""

Pixels: TypeAlias = NDArray[np.uint8]
"""Pixels from 0 to 255."""

MAX_NAMED = 10
"""The most names that a message lists; the remaining ones are counted."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Images(Protocol):
    """The labelled images of one split of a data set."""

    @property
    def labels(self) -> Integers:
        """The class of each image, counted from 0."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image in pixels, without decoding it."""
        ...

    def image(self, index: int, *, short_side: int | None = None) -> Image.Image:
        """Return an image in RGB.

        Args:
            index: The index of the image.
            short_side: Reduce an image with a longer short side to this short side; None keeps
                every image at its own size.
        """
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory, all of the same size.

    Attributes:
        labels: The class of each image, counted from 0.
        classes: The names of the classes.
        pixels: images x height x width (greyscale) or images x height x width x 3.
    """

    labels: Integers
    classes: tuple[str, ...]
    pixels: Pixels

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image in pixels."""
        height, width = self.pixels[index].shape[:2]
        return width, height

    def image(self, index: int, *, short_side: int | None = None) -> Image.Image:
        """Return an image in RGB, with a short side of at most ``short_side``."""
        image = _to_rgb(Image.fromarray(self.pixels[index]))
        return image if short_side is None else reduce_image(image, short_side)


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images in files, decoded on each access.

    Attributes:
        root: The folder of the data set, as the user typed it.
        labels: The class of each image, counted from 0.
        classes: The names of the classes.
        paths: The file of each image.
    """

    root: str
    labels: Integers
    classes: tuple[str, ...]
    paths: tuple[str, ...]

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image in pixels, from the header of its file.

        Raises:
            UnreadableError: Pillow cannot open the file.
        """
        try:
            with Image.open(self.paths[index]) as image:
                return image.size
        except Exception as error:  # Pillow raises many types for a broken file
            raise self.unreadable_error([index]) from error

    def image(self, index: int, *, short_side: int | None = None) -> Image.Image:
        """Return an image in RGB, with a short side of at most ``short_side``.

        A JPEG file that is reduced to less than half is decoded at the smallest of JPEG's scales
        (1/2, 1/4, 1/8) that leaves at least twice the requested size. Decoding is then faster, and
        the resize still filters the remaining pixels.

        Raises:
            UnreadableError: Pillow cannot decode the file.
        """
        try:
            with Image.open(self.paths[index]) as image:
                size = image.size
                if short_side is not None:
                    image.draft("RGB", (2 * short_side, 2 * short_side))
                colour = _to_rgb(image)
        except Exception as error:  # Pillow raises many types for a broken file
            raise self.unreadable_error([index]) from error
        return colour if short_side is None else reduce_image(colour, short_side, size=size)

    def find_unreadable(self) -> list[int]:
        """Read every file once and return the indices of those that cannot be decoded."""
        readable = map_threaded(self._is_readable, range(len(self.paths)))
        return [index for index, is_readable in enumerate(readable) if not is_readable]

    def unreadable_error(self, indices: Sequence[int]) -> "UnreadableError":
        """Return the error about images that cannot be read."""
        return UnreadableError(
            f"dataset.root is {self.root}, but {self.describe_unreadable(indices)}; replace or "
            "remove them (dataset=image_folder can skip them with dataset.allow_unreadable=true)",
            self,
            indices,
        )

    def describe_unreadable(self, indices: Sequence[int]) -> str:
        """Return how many images cannot be read, with the paths of the first `MAX_NAMED`."""
        names = [
            os.path.relpath(self.paths[index], Path(self.root).expanduser()) for index in indices
        ]
        more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
        return (
            f"{len(names):,} of {len(self.paths):,} images cannot be read "
            f"({', '.join(names[:MAX_NAMED])}{more})"
        )

    def without(self, indices: Sequence[int]) -> "FileImages":
        """Return the images except those at these indices."""
        skipped = set(indices)
        kept = [index for index in range(len(self.paths)) if index not in skipped]
        return FileImages(
            root=self.root,
            labels=self.labels[kept],
            classes=self.classes,
            paths=tuple(self.paths[index] for index in kept),
        )

    def _is_readable(self, index: int) -> bool:
        """Return whether a file can be decoded to its end; a JPEG file at its smallest scale."""
        try:
            self.image(index, short_side=1)
        except UnreadableError:
            return False
        return True


class UnreadableError(InputError):
    """Images that cannot be read.

    Attributes:
        images: The images of the split.
        indices: The indices of the images that cannot be read.
    """

    def __init__(self, message: str, images: FileImages, indices: Sequence[int]) -> None:
        super().__init__(message)
        self.images = images
        self.indices = tuple(indices)


def reduce_image(
    image: Image.Image, short_side: int, *, size: tuple[int, int] | None = None
) -> Image.Image:
    """Return the image reduced to a short side of at most ``short_side``; never enlarged.

    Args:
        image: The image.
        short_side: In pixels.
        size: Original width and height, for the aspect ratio of an image that was decoded at a
            smaller scale; by default the size of the image.
    """
    width, height = size or image.size
    if min(width, height) <= short_side:
        return image
    return image.resize(side_lengths(width, height, short_side), Image.Resampling.BILINEAR)


def side_lengths(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return width and height for a short side at the same aspect ratio, rounded as torchvision."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def map_threaded(
    task: Callable[[Item], Result], items: Sequence[Item], *, progress: str | None = None
) -> list[Result]:
    """Return ``task(item)`` for each item, in order, with a thread for each CPU.

    Pillow releases the GIL while it decodes and resizes.

    Args:
        task: The function to call.
        items: Its arguments.
        progress: Description of the progress bar; None shows none.
    """
    with ThreadPoolExecutor(_cpu_count()) as pool:
        results = pool.map(task, items)
        console = Console(stderr=True)
        if progress is None or not console.is_terminal:
            return list(results)
        return list(track(results, progress, total=len(items), transient=True, console=console))


def _cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the decoded image in RGB, without transparency."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
