"""A setting C = (D, N) of the paper, and the recipe and conditions it is trained under.

`Setting` and `Recipe` are part of what names a run; `Runtime` only says where and how it
runs. ``conf/`` is the one home of their default values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from widthopt.errors import InputError


class Network(Protocol):
    """A network N at width multiplier 1: ``conf/network`` chooses one by its ``_target_``."""

    @property
    def name(self) -> str:
        """The network's name in records, figures and messages."""
        ...

    def build(self, *, depth: int, classes: int) -> Any:
        """A freshly built ``torch.nn.Module`` with this depth multiplier and number of classes.

        Raises:
            InputError: The network cannot be made so deep.
        """
        ...

    def stages(self, model: Any) -> Sequence[tuple[str, Sequence[str]]]:
        """The stages of a built model: a name and the module names of its blocks, in order."""
        ...

    @property
    def rules(self) -> Mapping[Any, Any]:
        """Tracing rules for operations of its own, by module type or function; often none."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """A training setting C = (D, N), or its projection C-hat.

    Attributes:
        network: The network at width multiplier 1 and depth multiplier 1.
        classes: Number of classes of the data set.
        width: Width multiplier, on every width variable; above 0.
        depth: Depth multiplier, blocks of each stage are repeated; a whole number from 1.
        resolution: Side of the square input, in pixels.
        fraction: Part of the training images, in (0, 1].

    Source: paper section 3.1.
    """

    network: Network
    classes: int
    width: float
    depth: int
    resolution: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained; the paper's own is ``conf/recipe/paper.yaml``.

    Attributes:
        batch_size: Images in one optimiser step, from 2: the last map may be a single pixel.
        accumulation: Micro-batches that one optimiser step is split into.
        epochs: Epochs of a final training.
        search_epochs: Epochs of a width search; the schedule is squeezed into them.
        learning_rate: Peak learning rate for a batch of 256; the peak in use is
            ``learning_rate * batch_size / 256``.
        warmup_epochs: Epochs of linear warm-up from 0 to the peak; half a cosine to 0 follows.
        momentum: Nesterov momentum.
        weight_decay: On every parameter, those of BatchNorm too.
        label_smoothing: In [0, 1).
        augmentation: ``paper``: random resized crop, flip and RandAugment; ``crop``: a padded
            random crop and flip; ``none``.

    Source: paper appendix A; Radosavovic et al., 2020, "Designing Network Design Spaces".
    """

    batch_size: int
    accumulation: int
    epochs: int
    search_epochs: int
    learning_rate: float
    warmup_epochs: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    augmentation: Literal["paper", "crop", "none"]

    def __post_init__(self) -> None:
        for key, holds, rule in (
            (
                "batch_size",
                self.batch_size >= 2,  # noqa: PLR2004
                "a step takes at least two images, for BatchNorm's statistics",
            ),
            ("accumulation", self.accumulation >= 1, "a step has at least one micro-batch"),
            (
                "accumulation",
                self.accumulation <= self.batch_size,
                f"recipe.batch_size is {self.batch_size} and every micro-batch has an image",
            ),
            ("epochs", self.epochs >= 1, "a training takes at least one epoch"),
            ("search_epochs", self.search_epochs >= 1, "a search takes at least one epoch"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "it is a number above 0"),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "it is a number from 0 up"),
            ("momentum", 0 <= self.momentum < 1, "it is a number from 0 up and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "it is a number from 0 up"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "it is from 0 up and below 1"),
        ):
            if not holds:
                raise InputError(
                    f"recipe.{key} is {getattr(self, key):g}, but {rule}; conf/recipe/paper.yaml "
                    "has the paper's value"
                )

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.learning_rate * self.batch_size / 256


Backend = Literal["slice", "mask"]
"""How a supernet runs at fewer channels than its own; see `widthopt.networks.supernet`."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and how a run computes; no part of its name.

    Attributes:
        device: ``auto`` (an accelerator where there is one), or a torch device.
        workers: Processes that load images; 0 loads in the training process.
        precision: ``auto`` is bfloat16 autocast where the device is an accelerator that has
            it, else float32.
        memory_format: ``auto`` is what is faster on the device.
        backend: How supernets run at fewer channels; ``auto`` is what a short trial finds faster.
        progress: Show a progress bar.
    """

    device: str
    workers: int
    precision: Literal["auto", "float32", "bfloat16"]
    memory_format: Literal["auto", "contiguous", "channels_last"]
    backend: Literal["auto", "slice", "mask"]
    progress: bool

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError(
                f"runtime.workers is {self.workers}, but it is a number of processes; use 0 to "
                "load images in the training process, or a whole number above"
            )


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run asks a cluster for, where that differs from the launcher's; no part of its name.

    Attributes:
        search: By name, as in ``resources`` of ``conf/hydra/launcher/slurm.yaml``.
        train: The same for the final training.
    """

    search: Mapping[str, Any]
    train: Mapping[str, Any]
