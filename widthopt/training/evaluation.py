"""The accuracy of a network, and recalibration of its BatchNorm statistics."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widthopt.errors import InputError
from widthopt.setting import Runtime
from widthopt.training import distributed
from widthopt.training.devices import autocast, to_device


class TrainBatches(Protocol):
    """Training images in batches; see `widthopt.training.loop.Batches`."""

    @property
    def batch_size(self) -> int:
        """Number of images in a batch."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        ...

    def epoch(
        self, epoch: int, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, of each batch of an epoch (from 0), the part of process ``rank`` of ``ranks``."""
        ...


class EvaluationBatches(Protocol):
    """Every image once, in batches: float32 ``batch channels height width`` and int64 labels."""

    @property
    def images(self) -> int:
        """Number of images."""
        ...

    def part(self, rank: int, ranks: int) -> "EvaluationBatches":
        """Return the images that process ``rank`` of ``ranks`` evaluates."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch once."""
        ...


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy of a network.

    Attributes:
        top1: Images whose class has the highest score, in per cent.
        top5: Images whose class has one of the five highest scores, in per cent; with fewer than
            five classes, one of all scores.
        images: Number of images evaluated.
    """

    top1: float
    top5: float
    images: int


def evaluate(model: nn.Module, batches: EvaluationBatches, *, runtime: Runtime) -> Accuracy:
    """Return the accuracy of ``model``, in evaluation mode, on every image of ``batches``.

    The mode of each module is restored afterwards. An image with a NaN score counts as wrong. With
    several processes each evaluates a part, and all get the accuracy on all images.

    Args:
        model: Moved to the device.
        batches: Iterated once.
        runtime: Where and how to compute.

    Raises:
        InputError: There are no images, or no such device.
    """
    device, layout = to_device(model, runtime)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # correct, in the top 5, all
    if distributed.world_size() > 1:
        batches = batches.part(distributed.rank(), distributed.world_size())
    try:
        # Not inference mode: tensors that a data set or model caches may be used in training later.
        with torch.no_grad():
            for pixels, labels in batches:
                with autocast(runtime, device):
                    logits = model(pixels.to(device).contiguous(memory_format=layout))
                counts[:2] += count_correct(logits, labels.to(device))
                counts[2] += len(labels)
    finally:
        for module, mode in modes:
            module.training = mode
    distributed.all_reduce_sum([counts])
    *correct, images = counts.tolist()
    if images == 0:
        raise InputError("the evaluation has 0 images, but needs at least 1; give it more data")
    top1, top5 = (100 * count / images for count in correct)
    return Accuracy(top1=top1, top5=top5, images=images)


RECALIBRATION_IMAGES = 4096
"""Training images that `recalibrate` uses, unless there are fewer."""


def recalibration_steps(batch_size: int, steps_per_epoch: int) -> int:
    """Return the number of batches that `recalibrate` uses."""
    return min(steps_per_epoch, -(-RECALIBRATION_IMAGES // batch_size))


def recalibrate(model: nn.Module, batches: TrainBatches, *, runtime: Runtime) -> int:
    """Replace the running statistics of every BatchNorm by means over training images.

    A running mean changes slowly, so after a short training, or after channels were removed, it
    describes an earlier network. Every batch has the same weight, and so has each process's part.

    Args:
        model: Moved to the device; its parameters and modes are not changed.
        batches: The first batches of the first epoch are used.
        runtime: Where and how to compute.

    Returns:
        Number of images used.

    Source: Yu and Huang, 2019, "Universally Slimmable Networks", section 3.3, post-statistics
    of batch normalization.
    """
    device, layout = to_device(model, runtime)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout is off
    images = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.training = True
        steps = recalibration_steps(batches.batch_size, batches.steps_per_epoch)
        with torch.no_grad():
            epoch = batches.epoch(0, rank=distributed.rank(), ranks=distributed.world_size())
            for pixels, _ in itertools.islice(epoch, steps):
                with autocast(runtime, device):
                    model(pixels.to(device).contiguous(memory_format=layout))
                images += len(pixels)
        images = _average_over_processes(norms, images, device)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return images


def _average_over_processes(norms: Sequence[_BatchNorm], images: int, device: torch.device) -> int:
    """Average the running statistics over all processes; return the images of all of them."""
    ranks = distributed.world_size()
    if ranks == 1:
        return images
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    statistics = [buffer for buffer in buffers if buffer is not None]
    distributed.all_reduce_sum(statistics)
    for statistic in statistics:
        statistic.div_(ranks)
    total = torch.tensor(images, device=device)
    distributed.all_reduce_sum([total])
    return int(total)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the top-1 and top-5 correct predictions of a batch, on the device.

    Args:
        logits: ``batch classes``.
        labels: Class of each image, int64.

    Returns:
        The two counts, int64.
    """
    places = logits.topk(min(5, logits.shape[1])).indices
    hits = (places == labels[:, None]) & ~logits.isnan().any(1, keepdim=True)
    return torch.stack([hits[:, 0].sum(), hits.sum()])
