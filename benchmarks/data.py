"""How many images one loading process prepares while the model trains on one; 1 keeps up.

The loader alone, without worker processes, over a training step of ResNet18 on a batch that
is there already. CIFAR-100 and the photographs are read from ``../shared/data`` beside the
repository; where they are not there, images of the same sizes are made up, and the table
says so.
"""

import importlib.util
import itertools
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from harness import Figure, alternating, main
from hydra.utils import instantiate
from omegaconf import OmegaConf

from widthopt.data import Dataset, Split, search_split
from widthopt.data.dataset import DatasetChoice
from widthopt.data.images import ArrayImages
from widthopt.networks import TorchvisionNetwork
from widthopt.setting import Recipe, Runtime
from widthopt.training.loop import Loop, resolve_device


REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"
RUNTIME = Runtime(
    device="auto", workers=0, precision="auto", memory_format="auto", backend="auto", progress=False
)
RECIPE = Recipe(
    batch_size=64,
    accumulation=1,
    epochs=100,
    search_epochs=40,
    learning_rate=0.2,
    warmup_epochs=5,
    momentum=0.9,
    weight_decay=5e-5,
    label_smoothing=0.1,
    augmentation="none",
)
IMAGES = 2_000
"""Images that are loaded again and again."""


@dataclass(frozen=True, kw_only=True)
class Held(DatasetChoice):
    """Images that are in memory already."""

    images: ArrayImages

    def class_count(self) -> int:
        """How many classes there are."""
        return len(self.images.classes)

    def train(self) -> ArrayImages:
        """All of them."""
        return self.images

    def test(self) -> ArrayImages:
        """The same."""
        return self.images


def in_memory(name: str, images: ArrayImages) -> Dataset:
    """These images with what ``conf/dataset`` says of others like them."""
    conf: Any = OmegaConf.load(REPOSITORY / "conf" / "dataset" / f"{name}.yaml")
    return Held(images=images, **{field.name: conf[field.name] for field in fields(DatasetChoice)})


def noise_images(height: int, width: int, classes: int) -> ArrayImages:
    """Noise; what it shows costs no step of the loader anything."""
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (IMAGES, height, width, 3), dtype=np.uint8)
    names = tuple(map(str, range(classes)))
    return ArrayImages(np.arange(IMAGES, dtype=np.int64) % classes, names, pixels)


def cifar100() -> tuple[Dataset, str]:
    """CIFAR-100, or noise of its size, and which of the two."""
    script = SHARED / "unpack_cifar100.py"
    if not script.is_file():
        return in_memory("cifar100", noise_images(32, 32, 100)), "made up"
    spec = importlib.util.spec_from_file_location("unpack_cifar100", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pixels, labels, *_ = module.load(SHARED / "cifar100", "train", IMAGES)
    names = tuple(map(str, range(100)))
    images = ArrayImages(np.asarray(labels, dtype=np.int64), names, np.ascontiguousarray(pixels))
    return in_memory("cifar100", images), "real"


def photos(folder: str) -> tuple[Dataset, str]:
    """Photographs at their own sizes, or noise of one such size, and which of the two."""
    archive = SHARED / "photos" / "caltech101-subset.zip"
    if not archive.is_file():
        return in_memory("image_folder", noise_images(200, 300, 46)), "made up"
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    conf = OmegaConf.load(REPOSITORY / "conf" / "dataset" / "image_folder.yaml")
    dataset: Dataset = instantiate(OmegaConf.merge(conf, {"root": folder, "verify": False}))
    return dataset, "real"


def prepare_supernet(
    dataset: Dataset,
    resolution: int,
    augmentation: Literal["crop", "paper"],
    *,
    batch_size: int,
) -> tuple[Split, Recipe]:
    """The batches of a search on all the images."""
    recipe = replace(RECIPE, augmentation=augmentation, batch_size=batch_size)
    split = search_split(
        dataset,
        resolution=resolution,
        fraction=1.0,
        seed=0,
        recipe=recipe,
        runtime=RUNTIME,
        device=resolve_device(RUNTIME),
    )
    return split, recipe


def loading(split: Split) -> Callable[[], object]:
    """The next batch, epoch after epoch."""
    batches = itertools.chain.from_iterable(map(split.train.epoch, itertools.count()))
    return lambda: next(batches)


def stepping(split: Split, recipe: Recipe) -> Callable[[], None]:
    """A training step on the first batch."""
    model = TorchvisionNetwork("resnet18").build(depth=1, classes=split.classes)
    loop = Loop(model, recipe=recipe, steps_per_epoch=1000, epochs=100, seed=0, runtime=RUNTIME)
    images, labels = next(split.train.epoch(0))

    def step() -> None:
        loop.step(images, labels, loop.tally.step)

    return step


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield the images per second of the loader divided by those of the model."""
    with tempfile.TemporaryDirectory() as folder:
        sources = (("cifar100", 32, *cifar100()), ("photos", 64, *photos(folder)))
        for name, resolution, dataset, origin in sources:
            for augmentation in ("crop", "paper"):
                split, recipe = prepare_supernet(dataset, resolution, augmentation, batch_size=64)
                load, step, runs = alternating(
                    loading(split),
                    stepping(split, recipe),
                    runs=10 if quick else 40,
                    limit_seconds=4 if quick else math.inf,
                )
                size = split.train.batch_size
                yield Figure(
                    f"loader_{augmentation}/{name}/{resolution}",
                    step / load,
                    f"{size / load:,.0f} images/s, the model {size / step:,.0f}; {origin} images, "
                    f"{runs} x {size}",
                    "at least 1",
                )


if __name__ == "__main__":
    main(measure)
