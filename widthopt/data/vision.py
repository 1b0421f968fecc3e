"""Data sets that torchvision reads: its own by name, and any folder of images by class."""

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


Named = Literal["CIFAR10", "CIFAR100", "FashionMNIST", "ImageNet"]
"""The classes of ``torchvision.datasets`` that can be asked for by name."""


@dataclass(frozen=True, kw_only=True)
class VisionDataset(DatasetChoice):
    """One of torchvision's data sets.

    Attributes:
        dataset: Its class in ``torchvision.datasets``.
        root: The folder that torchvision looks in; ``~`` is the user's own folder.
        download: Let torchvision download what is missing. It cannot download ImageNet.
    """

    NON_IDENTITY_KEYS: ClassVar[frozenset[str]] = DatasetChoice.NON_IDENTITY_KEYS | {
        "root",
        "download",
    }

    dataset: Named
    root: str
    download: bool

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: A value lies outside its range.
        """
        super().__post_init__()
        if self.dataset not in get_args(Named):
            raise InputError(
                f"dataset.dataset is {self.dataset}, but the choices are "
                f"{', '.join(sorted(get_args(Named)))}; use one of them, or "
                "dataset=image_folder for images of your own"
            )
        if self.download and self.dataset == "ImageNet":
            raise InputError(
                "dataset.download is True, but ImageNet can only be had by its own terms; get "
                "its archives by hand, put them into dataset.root and set dataset.download=false"
            )

    def class_count(self) -> int:
        """How many classes there are; known without the images."""
        return {"CIFAR10": 10, "CIFAR100": 100, "FashionMNIST": 10, "ImageNet": 1000}[self.dataset]

    def published_counts(self) -> tuple[tuple[int, ...], int]:
        """How many training images each class has, and how many test images there are.

        Known without the images. ImageNet's classes have 732 to 1,300; here they are alike.
        """
        train, test = {
            "CIFAR10": (50_000, 10_000),
            "CIFAR100": (50_000, 10_000),
            "FashionMNIST": (60_000, 10_000),
            "ImageNet": (1_281_167, 50_000),
        }[self.dataset]
        classes = self.class_count()
        each, more = divmod(train, classes)
        return tuple(each + (label < more) for label in range(classes)), test

    def train(self) -> Images:
        """The training images.

        Raises:
            InputError: They are missing or broken.
        """
        return self._train

    def test(self) -> Images:
        """The test images; those of ImageNet are its validation images.

        Raises:
            InputError: They are missing or broken.
        """
        return self._test

    @cached_property
    def _train(self) -> Images:
        """The training images, looked up once."""
        return self._load(train=True)

    @cached_property
    def _test(self) -> Images:
        """The test images, looked up once."""
        return self._load(train=False)

    def _load(self, *, train: bool) -> Images:
        """The images of one split."""
        datasets = _torchvision_datasets()
        root = Path(self.root).expanduser()
        constructor = getattr(datasets, self.dataset)
        try:
            if self.dataset == "ImageNet":
                loaded = constructor(root, split="train" if train else "val")
            else:
                loaded = constructor(root, train=train, download=self.download)
        except (RuntimeError, OSError, ValueError, EOFError, ImportError) as error:
            raise self._missing(error) from error
        if self.dataset == "ImageNet":
            names = tuple(
                f"{folder} {words[0]}"  # two classes are a crane
                for folder, words in zip(loaded.wnids, loaded.classes, strict=True)
            )
            return _file_images(self.root, loaded.samples, names)
        return ArrayImages(
            labels=np.asarray(loaded.targets, dtype=np.int64),
            classes=tuple(loaded.classes),
            pixels=np.ascontiguousarray(loaded.data, dtype=np.uint8),
        )

    def _missing(self, error: Exception) -> InputError:
        """The error that says what torchvision did not find, and what to do."""
        reason = _one_line(error)
        if self.dataset == "ImageNet":
            remedy = (
                "put ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and "
                "ILSVRC2012_img_val.tar there, or use dataset=image_folder for folders that "
                "are unpacked already"
            )
        elif self.download:
            remedy = f"put the unpacked files of {self.dataset} there by hand"
        else:
            remedy = (
                "download it with dataset.download=true, or point dataset.root to the folder "
                "that has it"
            )
        return InputError(
            f"dataset.root is {self.root}, but torchvision finds no complete {self.dataset} "
            f"there ({reason}); {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class ImageFolder(DatasetChoice):
    """Images of your own: ``root/train/<class>/...`` and ``root/val/<class>/...``.

    ``root/test`` is read where there is no ``root/val``. Either is only ever tested on: a
    search holds its validation images out of the training images.

    Attributes:
        root: The folder; ``~`` is the user's own folder.
        verify: Read every image once, before work starts, so that a broken one is not met in
            the middle of a run. Takes about a millisecond an image and processor.
        allow_unreadable: Skip images that cannot be read, with a warning that names them;
            implies ``verify``.
    """

    NON_IDENTITY_KEYS: ClassVar[frozenset[str]] = DatasetChoice.NON_IDENTITY_KEYS | {"verify"}

    root: str
    verify: bool
    allow_unreadable: bool

    def class_count(self) -> int:
        """How many classes there are: as many as ``root/train`` has folders."""
        return len(classes(self))

    def train(self) -> FileImages:
        """The training images.

        Raises:
            InputError: They are missing or broken.
        """
        return self._train

    def test(self) -> FileImages:
        """The images in ``val``, or in ``test`` where there is no ``val``.

        Raises:
            InputError: They are missing or broken.
        """
        return self._test

    @cached_property
    def _train(self) -> FileImages:
        """The training images, looked up once."""
        return self._load("train")

    @cached_property
    def _test(self) -> FileImages:
        """The test images, looked up once."""
        return self._load("val", "test")

    def _load(self, *folders: str) -> FileImages:
        """The images in the first of these folders that exists."""
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise InputError(
                f"dataset.root is {self.root}, but there is no such folder; give the folder "
                "that holds train/<class> and val/<class>"
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
                f"{folder.name} has images ({_one_line(error)}); add images or remove the "
                "empty folders"
            ) from error
        images = _file_images(self.root, loaded.samples, tuple(loaded.classes))
        return self._readable(images) if self.verify or self.allow_unreadable else images

    def _readable(self, images: FileImages) -> FileImages:
        """The images that can be read; an error, or a warning, where there are others."""
        broken = images.broken()
        if not broken:
            return images
        if not self.allow_unreadable:
            raise images.unreadable(broken)
        warnings.warn(
            f"dataset.root is {self.root}, and {images.named(broken)}; they are skipped, as "
            "dataset.allow_unreadable is true",
            stacklevel=2,
        )
        return images.without(broken)


def _file_images(
    root: str, samples: list[tuple[str | os.PathLike[str], int]], names: tuple[str, ...]
) -> FileImages:
    """Images in files, from torchvision's pairs of path and label."""
    return FileImages(
        root=root,
        labels=np.array([label for _, label in samples], dtype=np.int64),
        classes=names,
        paths=tuple(os.fspath(path) for path, _ in samples),
    )


def _torchvision_datasets() -> Any:
    """``torchvision.datasets``, imported when it is first needed: it brings torch along."""
    from torchvision import datasets  # noqa: PLC0415

    return datasets


def _one_line(error: Exception) -> str:
    """The first sentence of an error, lower case, without its full stop."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{text[:1].lower()}{text[1:]}" if text else type(error).__name__
