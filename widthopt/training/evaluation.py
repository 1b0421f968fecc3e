"""How often a network is right, and BatchNorm statistics that fit it."""

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
    """Training images in batches; see `widthopt.training.Batches`."""

    @property
    def batch_size(self) -> int:
        """Images in one batch."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        ...

    def epoch(
        self, epoch: int, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from 0; of each the part of process ``rank`` of ``ranks``."""
        ...


class EvaluationBatches(Protocol):
    """Each image once, in batches: float32 ``batch channels height width`` and int64 labels."""

    @property
    def images(self) -> int:
        """How many images there are."""
        ...

    def part(self, rank: int, ranks: int) -> "EvaluationBatches":
        """The images that one of several processes evaluates."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over them."""
        ...


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often a network is right.

    Attributes:
        top1: Images whose class has the highest score, in per cent.
        top5: Images whose class is among the five highest, in per cent; among all of them
            where there are fewer than five classes.
        images: How many images this was measured on.
    """

    top1: float
    top5: float
    images: int


def evaluate(model: nn.Module, batches: EvaluationBatches, *, runtime: Runtime) -> Accuracy:
    """The accuracy of ``model``, in evaluation mode, on every image of ``batches``.

    Each module's own mode is restored afterwards. An image with a score that is not a number
    counts as wrong. Of several processes each evaluates a part, and all get the whole's accuracy.

    Args:
        model: Moved to the device.
        batches: Passed over once.
        runtime: Where to compute, and how.

    Raises:
        InputError: There are no images, or no such device.
    """
    device, layout = to_device(model, runtime)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # right, within five, all
    if distributed.world_size() > 1:
        batches = batches.part(distributed.rank(), distributed.world_size())
    try:
        # Not inference mode: what a data set or a model caches here may be trained on later.
        with torch.no_grad():
            for pixels, labels in batches:
                with autocast(runtime, device):
                    logits = model(pixels.to(device).contiguous(memory_format=layout))
                counts[:2] += right_at_1_and_5(logits, labels.to(device))
                counts[2] += len(labels)
    finally:
        for module, mode in modes:
            module.training = mode
    distributed.all_reduce_sum([counts])
    *right, images = counts.tolist()
    if images == 0:
        raise InputError("the evaluation has 0 images, but needs at least 1; give it more data")
    top1, top5 = (100 * count / images for count in right)
    return Accuracy(top1=top1, top5=top5, images=images)


RECALIBRATION_IMAGES = 4096
"""How many training images new BatchNorm statistics are the mean over, where there are so many."""


def recalibration_steps(batch_size: int, steps_per_epoch: int) -> int:
    """Batches that `recalibrate` passes forward."""
    return min(steps_per_epoch, -(-RECALIBRATION_IMAGES // batch_size))


def recalibrate(model: nn.Module, batches: TrainBatches, *, runtime: Runtime) -> int:
    """Replace the running statistics of every BatchNorm by means over training images.

    A running mean forgets slowly, so after a short training, or once channels were removed,
    it describes a network that is no longer there. Every batch counts alike, and so does every
    process's part of one.

    Args:
        model: Moved to the device; its parameters and modes stay as they are.
        batches: The first batches of their first epoch are passed forward.
        runtime: Where to compute, and how.

    Returns:
        How many images were passed forward.

    Source: Yu and Huang, 2019, "Universally Slimmable Networks", section 3.3, post-statistics
    of batch normalization.
    """
    device, layout = to_device(model, runtime)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # nothing is drawn: dropout is off
    images = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.training = True
        steps = recalibration_steps(batches.batch_size, batches.steps_per_epoch)
        with torch.no_grad():
            mine = batches.epoch(0, rank=distributed.rank(), ranks=distributed.world_size())
            for pixels, _ in itertools.islice(mine, steps):
                with autocast(runtime, device):
                    model(pixels.to(device).contiguous(memory_format=layout))
                images += len(pixels)
        images = _over_processes(norms, images, device)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return images


def _over_processes(norms: Sequence[_BatchNorm], images: int, device: torch.device) -> int:
    """Let running statistics be the means over all processes; the images of all of them."""
    ranks = distributed.world_size()
    if ranks == 1:
        return images
    statistics = [one for norm in norms for one in (norm.running_mean, norm.running_var)]
    kept = [one for one in statistics if one is not None]
    distributed.all_reduce_sum(kept)
    for one in kept:
        one.div_(ranks)
    total = torch.tensor(images, device=device)
    distributed.all_reduce_sum([total])
    return int(total)


def right_at_1_and_5(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of a batch are right at the first place and within five, left on the device.

    Args:
        logits: ``batch classes``.
        labels: The class of each, int64.
    """
    places = logits.topk(min(5, logits.shape[1])).indices
    hits = (places == labels[:, None]) & ~logits.isnan().any(1, keepdim=True)
    return torch.stack([hits[:, 0].sum(), hits.sum()])
