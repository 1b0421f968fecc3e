"""How often a network is right: top-1 and top-5 accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from widthopt.devices import autocast, place
from widthopt.errors import InputError
from widthopt.setting import Runtime


class EvaluationBatches(Protocol):
    """Each image once, in batches: float32 ``batch channels height width`` and int64 labels."""

    @property
    def images(self) -> int:
        """How many images there are."""
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
    counts as wrong.

    Args:
        model: Moved to the device.
        batches: Passed over once.
        runtime: Where to compute, and how.

    Raises:
        InputError: There are no images, or no such device.
    """
    device, layout = place(model, runtime)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    right = torch.zeros(2, dtype=torch.int64, device=device)
    images = 0
    try:
        # Not inference mode: what a data set or a model caches here may be trained on later.
        with torch.no_grad():
            for pixels, labels in batches:
                with autocast(runtime, device):
                    logits = model(pixels.to(device).contiguous(memory_format=layout))
                right += _right(logits, labels.to(device))
                images += len(labels)
    finally:
        for module, mode in modes:
            module.training = mode
    if images == 0:
        raise InputError("the evaluation has 0 images, but needs at least 1; give it more data")
    top1, top5 = (100 * count / images for count in right.tolist())
    return Accuracy(top1=top1, top5=top5, images=images)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of a batch are right at the first place and within five, left on the device."""
    places = logits.topk(min(5, logits.shape[1])).indices
    hits = (places == labels[:, None]) & ~logits.isnan().any(1, keepdim=True)
    return torch.stack([hits[:, 0].sum(), hits.sum()])
