"""Normalised batches on a device.

A batch depends only on seed, epoch and step. Training can therefore resume at any step with any
number of worker processes, and each rank can take its part of the same batch.
"""

import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from widthopt.data.augmentation import (
    PADDING,
    PaperAugmentation,
    crop_draws,
    crop_images,
    preserve_global_rngs,
)
from widthopt.data.cache import (
    CachedEvalCrops,
    EvalCrops,
    FullImages,
    load_eval_crops,
    load_full_images,
)
from widthopt.data.dataset import Dataset, classes
from widthopt.data.images import Images, Integers, Pixels
from widthopt.data.subsets import Counts, check_fraction, split_validation, stratify
from widthopt.errors import InputError
from widthopt.seeds import derive_seed
from widthopt.setting import Recipe, Runtime
from widthopt.training.devices import memory_format


Batch: TypeAlias = tuple[Pixels, Integers]
"""A batch as it is loaded: images x 3 x side x side, and the labels."""

PREFETCH = 2
"""Batches that each worker loads in advance."""


@dataclass(frozen=True, eq=False)
class Split:
    """The batches of a search or training.

    Attributes:
        train: Batches to train on.
        evaluation: Batches to evaluate on.
        classes: Number of classes.
    """

    train: "TrainBatches"
    evaluation: "EvaluationBatches"
    classes: int


@dataclass(frozen=True, eq=False)
class Placement:
    """The device, memory format and normalisation of batches.

    Attributes:
        device: The device of the batches.
        workers: Processes that load images; 0 loads in the calling process.
        memory_format: Memory format of the images.
        scale: Factor on the pixels, 0 to 255, of each channel; 1 x 3 x 1 x 1.
        shift: Summand of each channel after scaling; 1 x 3 x 1 x 1.
    """

    device: torch.device
    workers: int
    memory_format: torch.memory_format
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, dataset: Dataset, *, runtime: Runtime, device: torch.device) -> "Placement":
        """Return the placement for a data set and a runtime."""
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            for values in (dataset.mean, dataset.std)
        )
        return cls(
            device=device,
            workers=runtime.workers,
            memory_format=memory_format(runtime, device),
            scale=(1 / (255 * std)).to(device, torch.float32),
            shift=(-mean / std).to(device, torch.float32),
        )

    def stream(
        self, load: Callable[[int], Batch], steps: Sequence[int], *, in_memory: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (float32, normalised) and labels (int64) of each step, on the device.

        Args:
            load: Returns the batch of a step; the result depends only on the step.
            steps: The steps, in order.
            in_memory: Whether loading only copies memory. A thread then loads in advance, because
                worker processes would be slower.

        Raises:
            InputError: An image cannot be read.
        """
        pinned = self.device.type == "cuda"
        if not in_memory:
            loaded = _load_in_processes(load, steps, workers=self.workers, pinned=pinned)
        elif self.workers > 0:
            loaded = _load_in_thread(load, steps, pinned=pinned)
        else:
            loaded = (_to_tensors(load(step), pinned=pinned) for step in steps)
        for pixels, labels in loaded:
            images = pixels.to(self.device, non_blocking=pinned).to(
                torch.float32, memory_format=self.memory_format
            )
            images.mul_(self.scale).add_(self.shift)
            yield images, labels.to(self.device, non_blocking=pinned)


class TrainBatches:
    """Shuffled, augmented batches of equal size; an incomplete last batch is dropped.

    Attributes:
        images: Images in each epoch, in complete batches.
        batch_size: Images in each batch; the recipe's batch size, or all images if they are fewer.
        steps_per_epoch: Batches in each epoch.
        classes: Number of classes.
    """

    def __init__(
        self,
        augmented: "AugmentedImages",
        labels: Integers,
        *,
        classes: int,
        batch_size: int,
        seed: int,
        placement: Placement,
    ) -> None:
        """Store images and labels.

        Args:
            augmented: The images.
            labels: The class of each image.
            classes: Number of classes.
            batch_size: Requested images in each batch.
            seed: The run's seed.
            placement: Device, memory format and normalisation.
        """
        counts = Counts.of(len(labels), 0, batch_size=batch_size)
        self.batch_size = counts.batch_size
        self.steps_per_epoch = counts.steps_per_epoch
        self.images = counts.per_epoch
        self.classes = classes
        self._augmented = augmented
        self._labels = labels
        self._seed = seed
        self._placement = placement

    def epoch(
        self, epoch: int, *, first_step: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch.

        Args:
            epoch: The epoch, counted from 0; order and augmentation depend on it.
            first_step: The first step to return; its batch and the following ones are those of an
                uninterrupted epoch.
            rank: Rank of the process. Each process gets a part of every batch, and the parts in
                the order of the ranks are the batch of a single process.
            ranks: World size.

        Yields:
            Images, batch x 3 x height x width, float32 and normalised, and labels, int64.

        Raises:
            InputError: An image cannot be read.
        """
        count = len(self._labels)
        order = np.random.default_rng(derive_seed(self._seed, "order", epoch)).permutation(count)
        size = self.batch_size
        part = slice(rank * size // ranks, (rank + 1) * size // ranks)

        def load(step: int) -> Batch:
            positions = order[step * size : (step + 1) * size]
            step_seed = derive_seed(self._seed, "augmentation", epoch * self.steps_per_epoch + step)
            images = self._augmented(positions, part=part, seed=step_seed)
            return images, self._labels[positions[part]]

        return self._placement.stream(
            load, range(first_step, self.steps_per_epoch), in_memory=self._augmented.in_memory
        )


class EvaluationBatches:
    """Batches of every image once, in order, each resized and cropped at the centre.

    Attributes:
        images: Number of images.
    """

    def __init__(
        self, crops: EvalCrops, labels: Integers, *, batch_size: int, placement: Placement
    ) -> None:
        """Store images and labels.

        Args:
            crops: The images.
            labels: The class of each image.
            batch_size: Images in each batch except the last.
            placement: Device, memory format and normalisation.
        """
        self.images = len(labels)
        self._crops = crops
        self._labels = labels
        self._batch_size = batch_size
        self._placement = placement
        self._positions = np.arange(len(labels))

    def part(self, rank: int, ranks: int) -> "EvaluationBatches":
        """Return the images that a process evaluates: every ``ranks``-th image.

        Args:
            rank: Rank of the process.
            ranks: World size.
        """
        return self._select(self._positions[rank::ranks], batch_size=self._batch_size)

    def sample(self, images: int, *, batch_size: int, seed: int) -> "EvaluationBatches":
        """Return a random sample of the images in random order.

        Results that depend on batch statistics need it if the images are sorted by class.

        Args:
            images: Size of the sample, at most all images.
            batch_size: Images in each batch except the last.
            seed: Seed of the sample and its order.
        """
        order = np.random.default_rng(seed).permutation(self._positions)
        return self._select(order[:images], batch_size=batch_size)

    def share(self, rank: int, ranks: int) -> "EvaluationBatches":
        """Return the batches that a process takes: every ``ranks``-th batch, undivided.

        Args:
            rank: Rank of the process.
            ranks: World size.
        """
        starts = range(rank * self._batch_size, self.images, ranks * self._batch_size)
        parts = [self._positions[start : start + self._batch_size] for start in starts]
        positions = np.concatenate([self._positions[:0], *parts])
        return self._select(positions, batch_size=self._batch_size)

    def _select(self, positions: Integers, *, batch_size: int) -> "EvaluationBatches":
        """Return batches of the images at these positions, in this order."""
        selected = EvaluationBatches(
            self._crops, self._labels, batch_size=batch_size, placement=self._placement
        )
        selected._positions = positions
        selected.images = len(positions)
        return selected

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, batch x 3 x height x width, float32 and normalised, and labels, int64."""
        size = self._batch_size

        def load(step: int) -> Batch:
            positions = self._positions[step * size : (step + 1) * size]
            return self._crops(positions), self._labels[positions]

        return self._placement.stream(
            load,
            range(math.ceil(self.images / size)),
            in_memory=isinstance(self._crops, CachedEvalCrops),
        )


def search_split(
    dataset: Dataset,
    *,
    resolution: int,
    fraction: float,
    seed: int,
    recipe: Recipe,
    runtime: Runtime,
    device: torch.device,
) -> Split:
    """Return the batches of a width search, on a stratified fraction of the training images.

    The data set's validation share of that fraction is held out for evaluation. The test
    images are not used.

    Args:
        dataset: A choice of ``conf/dataset``.
        resolution: Side of the square input in pixels.
        fraction: Part of the training images, in (0, 1].
        seed: The run's seed.
        recipe: Sets batch size and augmentation.
        runtime: Sets workers and memory format.
        device: The device of the batches.

    Raises:
        InputError: As for `check`, except for errors about the test images.
    """
    check_fraction(dataset, fraction=fraction, key="projection.fraction")
    images = dataset.train()
    drawn = stratify(images.labels, classes=len(images.classes), fraction=fraction, seed=seed)
    train, validate = split_validation(drawn, validation=dataset.validation)
    builder = SplitBuilder(dataset, resolution, seed, recipe, runtime, device)
    return builder.build(images, train, evaluated=images, evaluation=validate)


def target_split(
    dataset: Dataset,
    *,
    resolution: int,
    seed: int,
    recipe: Recipe,
    runtime: Runtime,
    device: torch.device,
) -> Split:
    """Return the batches of a final training: all training images, and the test images.

    Args:
        dataset: A choice of ``conf/dataset``.
        resolution: Side of the square input in pixels.
        seed: The run's seed.
        recipe: Sets batch size and augmentation.
        runtime: Sets workers and memory format.
        device: The device of the batches.

    Raises:
        InputError: Images are missing or cannot be read, or there are fewer than two classes.
    """
    classes(dataset)
    train, test = dataset.train(), dataset.test()
    builder = SplitBuilder(dataset, resolution, seed, recipe, runtime, device)
    return builder.build(
        train,
        np.arange(len(train.labels)),
        evaluated=test,
        evaluation=np.arange(len(test.labels)),
    )


class AugmentedImages:
    """Training images with augmentation."""

    in_memory: bool
    """Whether loading a batch only copies memory."""

    def __call__(self, positions: Integers, *, part: slice, seed: int) -> Pixels:
        """Return a part of a batch, images x 3 x side x side.

        Args:
            positions: The images of the complete batch.
            part: The part to return; its images are those of the complete batch.
            seed: Seed of all random numbers of the complete batch.
        """
        raise NotImplementedError


class PlainImages(AugmentedImages):
    """Training images without augmentation, as for evaluation."""

    def __init__(self, images: EvalCrops) -> None:
        self.in_memory = isinstance(images, CachedEvalCrops)
        self._images = images

    def __call__(self, positions: Integers, *, part: slice, seed: int) -> Pixels:  # noqa: ARG002
        """Return a part of a batch; the seed has no effect."""
        return self._images(positions[part])


class CroppedImages(AugmentedImages):
    """Training images with padded random crop and flip."""

    def __init__(self, images: EvalCrops, *, padding: int, flip: bool) -> None:
        self.in_memory = isinstance(images, CachedEvalCrops)
        self._images = images
        self._padding = padding
        self._flip = flip

    def __call__(self, positions: Integers, *, part: slice, seed: int) -> Pixels:
        """Return a part of a batch; the random numbers are drawn for the complete batch."""
        draws = crop_draws(len(positions), padding=self._padding, flip=self._flip, seed=seed)
        return crop_images(self._images(positions[part]), draws[part], padding=self._padding)


class PaperImages(AugmentedImages):
    """Training images with the paper's augmentation."""

    in_memory = False

    def __init__(self, images: FullImages, augmentation: PaperAugmentation) -> None:
        self._images = images
        self._augmentation = augmentation

    def __call__(self, positions: Integers, *, part: slice, seed: int) -> Pixels:
        """Return a part of a batch; each image has its own seed."""
        with preserve_global_rngs():
            return np.stack(
                [
                    self._augmentation(
                        self._images(int(positions[index])), seed=derive_seed(seed, index)
                    )
                    for index in range(len(positions))[part]
                ]
            )


@dataclass(frozen=True, eq=False)
class SplitBuilder:
    """Builds the batches of a search or training from images."""

    dataset: Dataset
    resolution: int
    seed: int
    recipe: Recipe
    runtime: Runtime
    device: torch.device

    def build(
        self, images: Images, train: Integers, *, evaluated: Images, evaluation: Integers
    ) -> Split:
        """Return batches to train on and batches to evaluate on.

        The evaluation images may take the part of the memory limit that the training images leave.
        """
        placement = Placement.of(self.dataset, runtime=self.runtime, device=self.device)
        limit_bytes = self.dataset.memory_limit_gb * 1e9
        augmented, used_bytes = self._augment(images, train, limit_bytes=limit_bytes)
        crops = self._load_eval_crops(evaluated, evaluation, limit_bytes=limit_bytes - used_bytes)
        train_batches = TrainBatches(
            augmented,
            images.labels[train],
            classes=len(images.classes),
            batch_size=self.recipe.batch_size,
            seed=self.seed,
            placement=placement,
        )
        evaluation_batches = EvaluationBatches(
            crops,
            evaluated.labels[evaluation],
            batch_size=max(1, self.recipe.batch_size // self.recipe.accumulation),
            placement=placement,
        )
        return Split(train_batches, evaluation_batches, len(images.classes))

    def _augment(
        self, images: Images, indices: Integers, *, limit_bytes: float
    ) -> tuple[AugmentedImages, int]:
        """Return images with the recipe's augmentation, and the size of their cache in bytes."""
        match self.recipe.augmentation:
            case "paper":
                # Deviation: timm crops from the image at its own size. Here a larger image is
                # reduced once, by default to 256 pixels for a resolution of 224, so that the
                # images of a proxy fit into memory. It is reduced without the cache too, so that
                # the memory limit does not change results. dataset.train_scale=null turns it off.
                scale = self.dataset.train_scale
                full = load_full_images(
                    images,
                    indices,
                    short_side=None if scale is None else max(1, round(self.resolution * scale)),
                    limit_bytes=limit_bytes,
                    progress=self.runtime.progress,
                )
                augmentation = PaperAugmentation(
                    resolution=self.resolution, mean=self.dataset.mean, flip=self.dataset.flip
                )
                return PaperImages(full, augmentation), full.stored_bytes
            case "crop":
                crops = self._load_eval_crops(images, indices, limit_bytes=limit_bytes)
                padding = self.resolution // PADDING
                return (
                    CroppedImages(crops, padding=padding, flip=self.dataset.flip),
                    crops.stored_bytes,
                )
            case "none":
                crops = self._load_eval_crops(images, indices, limit_bytes=limit_bytes)
                return PlainImages(crops), crops.stored_bytes
            case unknown:
                assert_never(unknown)

    def _load_eval_crops(
        self, images: Images, indices: Integers, *, limit_bytes: float
    ) -> EvalCrops:
        """Load some of the images as for evaluation."""
        return load_eval_crops(
            images,
            indices,
            resolution=self.resolution,
            crop=self.dataset.crop,
            limit_bytes=limit_bytes,
            progress=self.runtime.progress,
        )


@dataclass(frozen=True, eq=False)
class _StepDataset(torch.utils.data.Dataset[Any]):
    """The batches by step, as the worker processes load them.

    An `InputError` is returned as its message, because a `DataLoader` would raise it with the
    traceback of the worker.
    """

    load: Callable[[int], Batch]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | str:
        try:
            return _to_tensors(self.load(step), pinned=False)
        except InputError as error:
            return str(error)


def _load_in_processes(
    load: Callable[[int], Batch], steps: Sequence[int], *, workers: int, pinned: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in order, loaded by forked worker processes."""
    workers = min(workers, len(steps))
    loader: DataLoader[Any] = DataLoader(
        _StepDataset(load),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pinned,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # the default draws from the global rng
    )
    with warnings.catch_warnings():
        # The workers do not use the threads of this process.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, str):
            raise InputError(batch)
        yield batch


def _load_in_thread(
    load: Callable[[int], Batch], steps: Sequence[int], *, pinned: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in order, loaded in advance by a thread."""
    remaining = iter(steps)
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
        while True:
            for step in itertools.islice(remaining, PREFETCH - len(pending)):
                pending.append(pool.submit(lambda s: _to_tensors(load(s), pinned=pinned), step))
            if not pending:
                return
            yield pending.popleft().result()


def _to_tensors(batch: Batch, *, pinned: bool) -> tuple[Tensor, Tensor]:
    """Return the batch as tensors, in pinned memory if requested."""
    pixels, labels = (torch.from_numpy(array) for array in batch)
    return (pixels.pin_memory(), labels.pin_memory()) if pinned else (pixels, labels)


def _identity(batch: Any) -> Any:
    """Return the batch unchanged; the data set already returns complete batches."""
    return batch
