"""Data sets of torchvision by name, and folders of images."""

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from widthopt.data.dataset import DatasetChoice, classes
from widthopt.data.images import ArrayImages, FileImages, Images
from widthopt.errors import InputError


DatasetName = Literal["CIFAR10", "CIFAR100", "FashionMNIST", "ImageNet"]
"""The supported classes of ``torchvision.datasets``."""


@dataclass(frozen=True, kw_only=True)
class VisionDataset(DatasetChoice):
    """A data set of torchvision.

    Attributes:
        dataset: The name of its class in ``torchvision.datasets``.
        root: The folder with the data; ``~`` is the home folder.
        download: Whether torchvision downloads missing data. It cannot download ImageNet.
    """

    NON_IDENTITY_KEYS: ClassVar[frozenset[str]] = DatasetChoice.NON_IDENTITY_KEYS | {
        "root",
        "download",
    }

    dataset: DatasetName
    root: str
    download: bool

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: A value lies outside its range.
        """
        super().__post_init__()
        if self.dataset not in get_args(DatasetName):
            raise InputError(
                f"dataset.dataset is {self.dataset}, but the choices are "
                f"{', '.join(sorted(get_args(DatasetName)))}; use one of them, or "
                "dataset=image_folder for your own images"
            )
        if self.download and self.dataset == "ImageNet":
            raise InputError(
                "dataset.download is True, but torchvision cannot download ImageNet; copy its "
                "archives to dataset.root and set dataset.download=false"
            )

    def class_count(self) -> int:
        """Return the number of classes, which is known without the images."""
        return {"CIFAR10": 10, "CIFAR100": 100, "FashionMNIST": 10, "ImageNet": 1000}[self.dataset]

    def published_counts(self) -> tuple[tuple[int, ...], int]:
        """Return the number of training images of each class, and of test images.

        They are known without the images. The classes of ImageNet have 732 to 1,300 training
        images; here they have equal numbers.
        """
        train, test = {
            "CIFAR10": (50_000, 10_000),
            "CIFAR100": (50_000, 10_000),
            "FashionMNIST": (60_000, 10_000),
            "ImageNet": (1_281_167, 50_000),
        }[self.dataset]
        classes = self.class_count()
        count, rest = divmod(train, classes)
        return tuple(count + (label < rest) for label in range(classes)), test

    def train(self) -> Images:
        """Return the training images.

        Raises:
            InputError: Images are missing or cannot be read.
        """
        return self._train

    def test(self) -> Images:
        """Return the test images; for ImageNet its validation images.

        Raises:
            InputError: Images are missing or cannot be read.
        """
        return self._test

    @cached_property
    def _train(self) -> Images:
        """The training images, listed once."""
        return self._load(train=True)

    @cached_property
    def _test(self) -> Images:
        """The test images, listed once."""
        return self._load(train=False)

    def _load(self, *, train: bool) -> Images:
        """Return the images of a split."""
        datasets = _torchvision_datasets()
        root = Path(self.root).expanduser()
        constructor = getattr(datasets, self.dataset)
        try:
            if self.dataset == "ImageNet":
                loaded = constructor(root, split="train" if train else "val")
            else:
                loaded = constructor(root, train=train, download=self.download)
        except (RuntimeError, OSError, ValueError, EOFError, ImportError) as error:
            raise self._missing_error(error) from error
        if self.dataset == "ImageNet":
            names = tuple(
                f"{folder} {words[0]}"  # two classes are called crane
                for folder, words in zip(loaded.wnids, loaded.classes, strict=True)
            )
            return _file_images(self.root, loaded.samples, names)
        return ArrayImages(
            labels=np.asarray(loaded.targets, dtype=np.int64),
            classes=tuple(loaded.classes),
            pixels=np.ascontiguousarray(loaded.data, dtype=np.uint8),
        )

    def _missing_error(self, error: Exception) -> InputError:
        """Return the error about data that torchvision does not find."""
        reason = _first_sentence(error)
        if self.dataset == "ImageNet":
            remedy = (
                "copy ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and "
                "ILSVRC2012_img_val.tar to it, or use dataset=image_folder for unpacked folders"
            )
        elif self.download:
            remedy = f"copy the unpacked files of {self.dataset} to it"
        else:
            remedy = (
                "download it with dataset.download=true, or set dataset.root to the folder "
                "that contains it"
            )
        return InputError(
            f"dataset.root is {self.root}, but torchvision finds no complete {self.dataset} "
            f"in it ({reason}); {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class ImageFolder(DatasetChoice):
    """Your own images in ``root/train/<class>/...`` and ``root/val/<class>/...``.

    Without ``root/val``, ``root/test`` is read. Both are test images: a search takes its validation
    images from the training images.

    Attributes:
        root: The folder; ``~`` is the home folder.
        verify: Whether to read every image once before the run starts, so that an unreadable
            image does not stop it later. Takes about a millisecond for each image on one CPU.
        allow_unreadable: Whether to skip images that cannot be read, with a warning that names
            them; implies ``verify``.
    """

    NON_IDENTITY_KEYS: ClassVar[frozenset[str]] = DatasetChoice.NON_IDENTITY_KEYS | {"verify"}

    root: str
    verify: bool
    allow_unreadable: bool

    def class_count(self) -> int:
        """Return the number of classes, which is the number of folders in ``root/train``."""
        return len(classes(self))

    def train(self) -> FileImages:
        """Return the training images.

        Raises:
            InputError: Images are missing or cannot be read.
        """
        return self._train

    def test(self) -> FileImages:
        """Return the images in ``val``, or in ``test`` if there is no ``val``.

        Raises:
            InputError: Images are missing or cannot be read.
        """
        return self._test

    @cached_property
    def _train(self) -> FileImages:
        """The training images, listed once."""
        return self._load("train")

    @cached_property
    def _test(self) -> FileImages:
        """The test images, listed once."""
        return self._load("val", "test")

    def _load(self, *folders: str) -> FileImages:
        """Return the images in the first of these folders that exists."""
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise InputError(
                f"dataset.root is {self.root}, but there is no such folder; use the folder "
                "that contains train/<class> and val/<class>"
            )
        folder = next((root / name for name in folders if (root / name).is_dir()), None)
        if folder is None:
            raise InputError(
                f"dataset.root is {self.root}, but it has no folder {' or '.join(folders)}; "
                "arrange the images as train/<class> and val/<class>"
            )
        datasets = _torchvision_datasets()
        try:
            loaded = datasets.ImageFolder(folder)
        except OSError as error:
            raise InputError(
                f"dataset.root is {self.root}, but not every class folder in "
                f"{folder.name} has images ({_first_sentence(error)}); add images or remove the "
                "empty folders"
            ) from error
        images = _file_images(self.root, loaded.samples, tuple(loaded.classes))
        return self._check_readable(images) if self.verify or self.allow_unreadable else images

    def _check_readable(self, images: FileImages) -> FileImages:
        """Return the images that can be read, with a warning about the skipped ones.

        Raises:
            InputError: Images cannot be read, and ``allow_unreadable`` is False.
        """
        unreadable = images.find_unreadable()
        if not unreadable:
            return images
        if not self.allow_unreadable:
            raise images.unreadable_error(unreadable)
        warnings.warn(
            f"dataset.root is {self.root}, and {images.describe_unreadable(unreadable)}; they are "
            "skipped because dataset.allow_unreadable is true",
            stacklevel=2,
        )
        return images.without(unreadable)


def _file_images(
    root: str, samples: list[tuple[str | os.PathLike[str], int]], names: tuple[str, ...]
) -> FileImages:
    """Return the images of torchvision's pairs of path and label."""
    return FileImages(
        root=root,
        labels=np.array([label for _, label in samples], dtype=np.int64),
        classes=names,
        paths=tuple(os.fspath(path) for path, _ in samples),
    )


def _torchvision_datasets() -> Any:
    """Return ``torchvision.datasets``, which is imported here because it imports torch."""
    from torchvision import datasets  # noqa: PLC0415

    return datasets


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of an error in lower case, without the full stop."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{text[:1].lower()}{text[1:]}" if text else type(error).__name__
