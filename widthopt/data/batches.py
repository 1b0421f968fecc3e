"""Batches on the device: normalised, in the memory format asked for, the same every time.

A batch follows from (seed, epoch, step) alone, so training can resume at any step, with any
number of worker processes, and ranks can each take their part of the same batch.
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
from widthopt.data.cache import CachedEvalCrops, EvalCrops, FullImages, squares, wholes
from widthopt.data.dataset import Dataset, classes
from widthopt.data.images import Images, Integers, Pixels
from widthopt.data.subsets import Counts, check_fraction, held_out, stratify
from widthopt.errors import InputError
from widthopt.seeds import derived_seed
from widthopt.setting import Recipe, Runtime
from widthopt.training.devices import memory_format


Loaded: TypeAlias = tuple[Pixels, Integers]
"""One batch as it is loaded: images x 3 x side x side, and the labels."""

AHEAD = 2
"""Batches that each worker prepares before they are asked for."""


@dataclass(frozen=True, eq=False)
class Split:
    """What one training sees.

    Attributes:
        train: Batches to train on.
        evaluation: Batches to measure accuracy on.
        classes: Number of classes.
    """

    train: "TrainBatches"
    evaluation: "EvaluationBatches"
    classes: int


@dataclass(frozen=True, eq=False)
class Placement:
    """Where batches go and how they get there.

    Attributes:
        device: The device they end up on.
        workers: Processes that load images; 0 loads in the calling process.
        memory_format: Of the images.
        scale: What each channel's pixels, 0 to 255, are multiplied by; 1 x 3 x 1 x 1.
        shift: What is added then; 1 x 3 x 1 x 1.
    """

    device: torch.device
    workers: int
    memory_format: torch.memory_format
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, dataset: Dataset, *, runtime: Runtime, device: torch.device) -> "Placement":
        """The placement that a data set's mean and deviation and the runtime ask for."""
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
        self, load: Callable[[int], Loaded], steps: Sequence[int], *, immediate: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (float32, normalised) and labels (int64) of each step, on the device.

        Args:
            load: What gives the batch of one step; nothing but the step may matter to it.
            steps: The steps, in order.
            immediate: Loading is no more than a copy in memory: worker processes would cost
                more than they give, so a thread loads ahead instead.

        Raises:
            InputError: An image cannot be read.
        """
        pinned = self.device.type == "cuda"
        if not immediate:
            loaded = _with_processes(load, steps, workers=self.workers, pinned=pinned)
        elif self.workers > 0:
            loaded = _with_thread(load, steps, pinned=pinned)
        else:
            loaded = (_tensors(load(step), pinned=pinned) for step in steps)
        for pixels, labels in loaded:
            images = pixels.to(self.device, non_blocking=pinned).to(
                torch.float32, memory_format=self.memory_format
            )
            images.mul_(self.scale).add_(self.shift)
            yield images, labels.to(self.device, non_blocking=pinned)


class TrainBatches:
    """Shuffled, augmented batches of one size; what is left over at the end is dropped.

    Attributes:
        images: Images in each epoch: whole batches only.
        batch_size: Images in each batch; the recipe's, or all images where they are fewer.
        steps_per_epoch: Batches in each epoch.
        classes: Number of classes.
    """

    def __init__(
        self,
        augmented: "Augmented",
        labels: Integers,
        *,
        classes: int,
        batch_size: int,
        seed: int,
        placement: Placement,
    ) -> None:
        """Take over images and labels.

        Args:
            augmented: Gives the images of a batch.
            labels: The class of each image.
            classes: Number of classes.
            batch_size: Images in each batch, at most all.
            seed: The run's seed.
            placement: Where batches go.
        """
        counts = Counts.of(len(labels), 0, batch_size=batch_size)
        self.batch_size = counts.batch_size
        self.steps_per_epoch = counts.steps_per_epoch
        self.images = counts.per_epoch
        self.classes = classes
        self._augment = augmented
        self._labels = labels
        self._seed = seed
        self._placement = placement

    def epoch(
        self, epoch: int, *, first_step: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch.

        Args:
            epoch: Counted from 0; each has its own order and augmentation.
            first_step: Begin at this step of the epoch; the batches are those that an
                uninterrupted epoch would have had.
            rank: Which of ``ranks`` processes asks; each gets its own part of every batch,
                and the parts in order are the batch that one process would have had.
            ranks: Processes that train together.

        Yields:
            Images, batch x 3 x height x width, float32 and normalised, and labels, int64.

        Raises:
            InputError: An image cannot be read.
        """
        count = len(self._labels)
        order = np.random.default_rng(derived_seed(self._seed, "order", epoch)).permutation(count)
        size = self.batch_size
        part = slice(rank * size // ranks, (rank + 1) * size // ranks)

        def load(step: int) -> Loaded:
            positions = order[step * size : (step + 1) * size]
            step_seed = derived_seed(
                self._seed, "augmentation", epoch * self.steps_per_epoch + step
            )
            images = self._augment(positions, part=part, seed=step_seed)
            return images, self._labels[positions[part]]

        return self._placement.stream(
            load, range(first_step, self.steps_per_epoch), immediate=self._augment.immediate
        )


class EvaluationBatches:
    """Batches of every image once, in order, resized and cropped at the centre.

    Attributes:
        images: Number of images.
    """

    def __init__(
        self, prepared: EvalCrops, labels: Integers, *, batch_size: int, placement: Placement
    ) -> None:
        """Take over images and labels.

        Args:
            prepared: The images.
            labels: The class of each image.
            batch_size: Images in each batch but the last.
            placement: Where batches go.
        """
        self.images = len(labels)
        self._squares = prepared
        self._labels = labels
        self._batch_size = batch_size
        self._placement = placement
        self._positions = np.arange(len(labels))

    def part(self, rank: int, ranks: int) -> "EvaluationBatches":
        """The images that one of several processes evaluates: every ``ranks``-th.

        Args:
            rank: Which process, counted from 0.
            ranks: Processes that evaluate together.
        """
        return self._select(self._positions[rank::ranks], batch_size=self._batch_size)

    def sample(self, images: int, *, batch_size: int, seed: int) -> "EvaluationBatches":
        """Some of these images in random order, for what depends on who shares a batch.

        Args:
            images: How many, at most all.
            batch_size: Images in each batch but the last.
            seed: What the choice and the order depend on.
        """
        order = np.random.default_rng(seed).permutation(self._positions)
        return self._select(order[:images], batch_size=batch_size)

    def share(self, rank: int, ranks: int) -> "EvaluationBatches":
        """The batches, whole ones, that one of several processes takes: every ``ranks``-th.

        Args:
            rank: Which process, counted from 0.
            ranks: Processes that share them.
        """
        starts = range(rank * self._batch_size, self.images, ranks * self._batch_size)
        parts = [self._positions[start : start + self._batch_size] for start in starts]
        positions = np.concatenate([self._positions[:0], *parts])
        return self._select(positions, batch_size=self._batch_size)

    def _select(self, positions: Integers, *, batch_size: int) -> "EvaluationBatches":
        """Return the batches of the images at some positions, in this order."""
        selected = EvaluationBatches(
            self._squares, self._labels, batch_size=batch_size, placement=self._placement
        )
        selected._positions = positions
        selected.images = len(positions)
        return selected

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, batch x 3 x height x width, float32 and normalised, and labels, int64."""
        size = self._batch_size

        def load(step: int) -> Loaded:
            positions = self._positions[step * size : (step + 1) * size]
            return self._squares(positions), self._labels[positions]

        return self._placement.stream(
            load,
            range(math.ceil(self.images / size)),
            immediate=isinstance(self._squares, CachedEvalCrops),
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
    """What a width search sees: a stratified fraction of the training images.

    The data set's validation share of that fraction is held out for evaluation. The test
    images are not touched.

    Args:
        dataset: A choice of ``conf/dataset``.
        resolution: Side of the square input in pixels.
        fraction: Part of the training images, in (0, 1].
        seed: The run's seed.
        recipe: Batch size and augmentation are taken from it.
        runtime: Workers and memory format are taken from it.
        device: Where the batches go.

    Raises:
        InputError: As for `check`, but for what concerns the test images.
    """
    check_fraction(dataset, fraction=fraction, key="projection.fraction")
    images = dataset.train()
    drawn = stratify(images.labels, classes=len(images.classes), fraction=fraction, seed=seed)
    train, validate = held_out(drawn, validation=dataset.validation)
    preparation = Preparation(dataset, resolution, seed, recipe, runtime, device)
    return preparation.split(images, train, evaluated=images, evaluation=validate)


def target_split(
    dataset: Dataset,
    *,
    resolution: int,
    seed: int,
    recipe: Recipe,
    runtime: Runtime,
    device: torch.device,
) -> Split:
    """What a final training sees: all training images, and the test images.

    Args:
        dataset: A choice of ``conf/dataset``.
        resolution: Side of the square input in pixels.
        seed: The run's seed.
        recipe: Batch size and augmentation are taken from it.
        runtime: Workers and memory format are taken from it.
        device: Where the batches go.

    Raises:
        InputError: Images are missing or cannot be read, or there are fewer than two classes.
    """
    classes(dataset)
    images, tested = dataset.train(), dataset.test()
    preparation = Preparation(dataset, resolution, seed, recipe, runtime, device)
    return preparation.split(
        images,
        np.arange(len(images.labels)),
        evaluated=tested,
        evaluation=np.arange(len(tested.labels)),
    )


class Augmented:
    """The images of a batch as training sees them."""

    immediate: bool
    """Whether a batch is no more than a copy in memory."""

    def __call__(self, positions: Integers, *, part: slice, seed: int) -> Pixels:
        """Part of a batch, images x 3 x side x side.

        Args:
            positions: The images of the whole batch.
            part: Which part is asked for; it comes out as it would in the whole batch.
            seed: All draws for the whole batch follow from it.
        """
        raise NotImplementedError


class Plain(Augmented):
    """Images as they are evaluated."""

    def __init__(self, images: EvalCrops) -> None:
        self.immediate = isinstance(images, CachedEvalCrops)
        self._images = images

    def __call__(self, positions: Integers, *, part: slice, seed: int) -> Pixels:  # noqa: ARG002
        """Part of a batch; nothing is drawn."""
        return self._images(positions[part])


class Cropped(Augmented):
    """Images cropped after padding, and mirrored."""

    def __init__(self, images: EvalCrops, *, padding: int, flip: bool) -> None:
        self.immediate = isinstance(images, CachedEvalCrops)
        self._images = images
        self._padding = padding
        self._flip = flip

    def __call__(self, positions: Integers, *, part: slice, seed: int) -> Pixels:
        """Part of a batch; one draw serves the whole batch."""
        draws = crop_draws(len(positions), padding=self._padding, flip=self._flip, seed=seed)
        return crop_images(self._images(positions[part]), draws[part], padding=self._padding)


class PaperAugmented(Augmented):
    """Images with the paper's augmentation."""

    immediate = False

    def __init__(self, images: FullImages, augmentation: PaperAugmentation) -> None:
        self._images = images
        self._augmentation = augmentation

    def __call__(self, positions: Integers, *, part: slice, seed: int) -> Pixels:
        """Part of a batch; each image has a draw of its own."""
        places = range(len(positions))[part]
        with preserve_global_rngs():
            return np.stack(
                [
                    self._augmentation(
                        self._images(int(positions[place])), seed=derived_seed(seed, place)
                    )
                    for place in places
                ]
            )


@dataclass(frozen=True, eq=False)
class Preparation:
    """Turns images into batches under one set of conditions."""

    dataset: Dataset
    resolution: int
    seed: int
    recipe: Recipe
    runtime: Runtime
    device: torch.device

    def split(
        self, images: Images, train: Integers, *, evaluated: Images, evaluation: Integers
    ) -> Split:
        """Batches of some images to train on, and of others to evaluate.

        What the training images leave of the memory limit is there for the others.
        """
        placement = Placement.of(self.dataset, runtime=self.runtime, device=self.device)
        limit_bytes = self.dataset.memory_limit_gb * 1e9
        augmented, used_bytes = self._augment(images, train, limit_bytes=limit_bytes)
        prepared = self._squares(evaluated, evaluation, limit_bytes=limit_bytes - used_bytes)
        batches = TrainBatches(
            augmented,
            images.labels[train],
            classes=len(images.classes),
            batch_size=self.recipe.batch_size,
            seed=self.seed,
            placement=placement,
        )
        measured = EvaluationBatches(
            prepared,
            evaluated.labels[evaluation],
            batch_size=max(1, self.recipe.batch_size // self.recipe.accumulation),
            placement=placement,
        )
        return Split(batches, measured, len(images.classes))

    def _augment(
        self, images: Images, indices: Integers, *, limit_bytes: float
    ) -> tuple[Augmented, int]:
        """The recipe's augmentation of some images, and the memory that they take."""
        match self.recipe.augmentation:
            case "paper":
                # Deviation: timm crops from the image at its own size. Here an image larger
                # than the target needs is reduced once, by default to the usual 256 pixels
                # for 224, so that a proxy's images fit into memory; in memory or not, so
                # that the memory limit changes no result. dataset.train_scale=null turns
                # it off.
                scale = self.dataset.train_scale
                kept = wholes(
                    images,
                    indices,
                    short_side=None if scale is None else max(1, round(self.resolution * scale)),
                    limit_bytes=limit_bytes,
                    progress=self.runtime.progress,
                )
                augmentation = PaperAugmentation(
                    resolution=self.resolution, mean=self.dataset.mean, flip=self.dataset.flip
                )
                return PaperAugmented(kept, augmentation), kept.stored_bytes
            case "crop":
                prepared = self._squares(images, indices, limit_bytes=limit_bytes)
                padding = self.resolution // PADDING
                return (
                    Cropped(prepared, padding=padding, flip=self.dataset.flip),
                    prepared.stored_bytes,
                )
            case "none":
                prepared = self._squares(images, indices, limit_bytes=limit_bytes)
                return Plain(prepared), prepared.stored_bytes
            case other:
                assert_never(other)

    def _squares(self, images: Images, indices: Integers, *, limit_bytes: float) -> EvalCrops:
        """Some images as evaluation sees them."""
        return squares(
            images,
            indices,
            resolution=self.resolution,
            crop=self.dataset.crop,
            limit_bytes=limit_bytes,
            progress=self.runtime.progress,
        )


@dataclass(frozen=True, eq=False)
class _Steps(torch.utils.data.Dataset[Any]):
    """What a worker process calls: the batch of one step, or why there is none."""

    load: Callable[[int], Loaded]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | str:
        try:
            return _tensors(self.load(step), pinned=False)
        except InputError as error:  # raised again where it was asked for, as one line
            return str(error)


def _with_processes(
    load: Callable[[int], Loaded], steps: Sequence[int], *, workers: int, pinned: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that forked worker processes load, in order."""
    workers = min(workers, len(steps))
    loader: DataLoader[Any] = DataLoader(
        _Steps(load),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pinned,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # or starting it would draw from the caller's
    )
    with warnings.catch_warnings():
        # Workers never touch the threads that this process may have.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, str):
            raise InputError(batch)
        yield batch


def _with_thread(
    load: Callable[[int], Loaded], steps: Sequence[int], *, pinned: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that one thread loads ahead, in order."""
    remaining = iter(steps)
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
        while True:
            for step in itertools.islice(remaining, AHEAD - len(pending)):
                pending.append(pool.submit(lambda s: _tensors(load(s), pinned=pinned), step))
            if not pending:
                return
            yield pending.popleft().result()


def _tensors(batch: Loaded, *, pinned: bool) -> tuple[Tensor, Tensor]:
    """The batch as tensors, in memory that a device can copy from by itself if asked for."""
    pixels, labels = (torch.from_numpy(array) for array in batch)
    return (pixels.pin_memory(), labels.pin_memory()) if pinned else (pixels, labels)


def _as_it_is(batch: Any) -> Any:
    """The batch, which is whole already."""
    return batch
