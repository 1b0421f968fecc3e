"""Labelled images as a data set hands them over, before any transform.

An image is a Pillow image in RGB at its own size. Where it comes from, an array or a file,
is known only here.
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
"""Labels, or the indices of images."""

Pixels: TypeAlias = NDArray[np.uint8]
"""Pixels as they are stored, from 0 to 255."""

NAMED = 10
"""How many unreadable images a message names before it only counts them."""

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
        """Width and height of one image in pixels, without decoding it."""
        ...

    def image(self, index: int, *, short_side: int | None = None) -> Image.Image:
        """One image in RGB.

        Args:
            index: Which image.
            short_side: Reduce the image so that its short side is not above this; a smaller
                image stays as it is, and so does any image where this is None.
        """
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images that are in memory already, all of one size.

    Attributes:
        labels: The class of each image, counted from 0.
        classes: The names of the classes.
        pixels: images x height x width (greyscale) or images x height x width x 3.
    """

    labels: Integers
    classes: tuple[str, ...]
    pixels: Pixels

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of one image in pixels."""
        height, width = self.pixels[index].shape[:2]
        return width, height

    def image(self, index: int, *, short_side: int | None = None) -> Image.Image:
        """One image in RGB, its short side not above ``short_side``."""
        image = _rgb(Image.fromarray(self.pixels[index]))
        return image if short_side is None else reduce_image(image, short_side)


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images in files, decoded when they are asked for.

    Attributes:
        root: The folder of the data set, as the user gave it.
        labels: The class of each image, counted from 0.
        classes: The names of the classes.
        paths: The file of each image.
    """

    root: str
    labels: Integers
    classes: tuple[str, ...]
    paths: tuple[str, ...]

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of one image in pixels, from the head of its file.

        Raises:
            UnreadableError: The file is no image that Pillow can open.
        """
        try:
            with Image.open(self.paths[index]) as image:
                return image.size
        except Exception as error:  # Pillow raises nearly anything on a broken file
            raise self.unreadable([index]) from error

    def image(self, index: int, *, short_side: int | None = None) -> Image.Image:
        """One image in RGB, its short side not above ``short_side``.

        A JPEG file that is to be reduced to less than half is decoded at the smallest of its
        own scales (1/2, 1/4, 1/8) that leaves twice the size asked for: the decoder then has
        a fraction of the work, and the resize still filters what is left.

        Raises:
            UnreadableError: The file is no image that Pillow can decode.
        """
        try:
            with Image.open(self.paths[index]) as image:
                size = image.size
                if short_side is not None:
                    image.draft("RGB", (2 * short_side, 2 * short_side))
                colour = _rgb(image)
        except Exception as error:  # Pillow raises nearly anything on a broken file
            raise self.unreadable([index]) from error
        return colour if short_side is None else reduce_image(colour, short_side, size=size)

    def broken(self) -> list[int]:
        """The indices of the files that cannot be decoded; every file is read once."""
        return [
            index
            for index, readable in enumerate(map_threaded(self._decodes, range(len(self.paths))))
            if not readable
        ]

    def unreadable(self, indices: Sequence[int]) -> "UnreadableError":
        """The error that names the images that cannot be read."""
        return UnreadableError(
            f"dataset.root is {self.root}, but {self.named(indices)}; replace or remove what "
            "cannot be read (dataset=image_folder can also skip it, with "
            "dataset.allow_unreadable=true)",
            self,
            indices,
        )

    def named(self, indices: Sequence[int]) -> str:
        """How many images cannot be read, and which: the first ten by their paths."""
        names = [
            os.path.relpath(self.paths[index], Path(self.root).expanduser()) for index in indices
        ]
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        return (
            f"{len(names):,} of {len(self.paths):,} images cannot be read "
            f"({', '.join(names[:NAMED])}{more})"
        )

    def without(self, indices: Sequence[int]) -> "FileImages":
        """The same images but these."""
        skipped = set(indices)
        kept = [index for index in range(len(self.paths)) if index not in skipped]
        return FileImages(
            root=self.root,
            labels=self.labels[kept],
            classes=self.classes,
            paths=tuple(self.paths[index] for index in kept),
        )

    def _decodes(self, index: int) -> bool:
        """Whether one file decodes to its last byte; a JPEG file at its smallest scale."""
        try:
            self.image(index, short_side=1)
        except UnreadableError:
            return False
        return True


class UnreadableError(InputError):
    """Images that cannot be read.

    Attributes:
        images: The images that they are among.
        indices: Which ones.
    """

    def __init__(self, message: str, images: FileImages, indices: Sequence[int]) -> None:
        super().__init__(message)
        self.images = images
        self.indices = tuple(indices)


def reduce_image(
    image: Image.Image, short_side: int, *, size: tuple[int, int] | None = None
) -> Image.Image:
    """The image with a short side not above ``short_side``; never enlarged.

    Args:
        image: Any image.
        short_side: In pixels.
        size: Width and height that the aspect ratio is taken from, where the image has been
            decoded at a smaller scale; its own by default.
    """
    width, height = size or image.size
    if min(width, height) <= short_side:
        return image
    return image.resize(side_lengths(width, height, short_side), Image.Resampling.BILINEAR)


def side_lengths(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height at this short side and the same aspect ratio, as torchvision rounds."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def map_threaded(
    task: Callable[[Item], Result], items: Sequence[Item], *, progress: str | None = None
) -> list[Result]:
    """What ``task`` gives for each item, in order, with a thread for each processor.

    Pillow lets go of the interpreter's lock while it decodes and resizes.

    Args:
        task: What to do with one item.
        items: All of them.
        progress: What a progress bar says meanwhile; none is shown where this is None.
    """
    with ThreadPoolExecutor(_processors()) as pool:
        results = pool.map(task, items)
        console = Console(stderr=True)
        if progress is None or not console.is_terminal:
            return list(results)
        return list(track(results, progress, total=len(items), transient=True, console=console))


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _rgb(image: Image.Image) -> Image.Image:
    """The decoded image in RGB; transparency is dropped."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
