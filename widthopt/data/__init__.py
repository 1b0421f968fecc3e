"""Data sets, stratified fractions, resolution, augmentation and batches.

A `Dataset` describes images and their normalisation, `check` validates it before a run starts, and
`search_split` and `target_split` turn it into batches on a device. Only the batches import torch.
"""

from typing import TYPE_CHECKING, Any

from widthopt.data.dataset import Dataset, classes
from widthopt.data.images import Images
from widthopt.data.subsets import Counts, Sizes, check, search_counts, target_counts


if TYPE_CHECKING:
    from widthopt.data.batches import (
        EvaluationBatches,
        Split,
        TrainBatches,
        search_split,
        target_split,
    )

__all__ = [
    "Counts",
    "Dataset",
    "EvaluationBatches",
    "Images",
    "Sizes",
    "Split",
    "TrainBatches",
    "check",
    "classes",
    "search_counts",
    "search_split",
    "target_counts",
    "target_split",
]


def __getattr__(name: str) -> Any:
    """Return a name of `widthopt.data.batches`, which is imported when it is first needed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from widthopt.data import batches  # noqa: PLC0415 (imports torch)

    return getattr(batches, name)
