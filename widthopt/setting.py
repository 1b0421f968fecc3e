"""A setting C = (D, N) of the paper, its training recipe, and the runtime options.

`Setting` and `Recipe` are part of the identity of a run; `Runtime` and `Resources` are not.
Their default values are in ``conf/``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from widthopt.errors import check_fields, check_value


class Network(Protocol):
    """A network N at width multiplier 1; ``_target_`` in ``conf/network`` names its class."""

    @property
    def name(self) -> str:
        """The network's name in records, figures and messages."""
        ...

    def build(self, *, depth: int, classes: int) -> Any:
        """Build a ``torch.nn.Module`` with this depth multiplier and number of classes.

        Raises:
            AxisError: The network cannot have this depth.
        """
        ...

    def stages(self, model: Any) -> Sequence[tuple[str, Sequence[str]]]:
        """Return the name and the module names of the blocks of each stage of a model, in order."""
        ...

    @property
    def rules(self) -> Mapping[Any, Any]:
        """Tracing rules for operations of the network, by module type or function; often empty."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """A training setting C = (D, N), or its projection C-hat.

    Attributes:
        network: The network at width multiplier 1 and depth multiplier 1.
        classes: Number of classes of the data set.
        width: Width multiplier, a factor above 0 on every width variable.
        depth: Depth multiplier, a factor of at least 1 on the blocks of every stage; an integer.
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
    """The hyperparameters of a training; those of the paper are in ``conf/recipe/paper.yaml``.

    Attributes:
        batch_size: Images in one optimiser step, at least 2.
        accumulation: Micro-batches in one optimiser step.
        epochs: Epochs of a final training.
        search_epochs: Epochs of a width search; the schedule is scaled to them.
        learning_rate: Peak learning rate for a batch of 256. The actual peak is
            ``learning_rate * batch_size / 256``.
        warmup_epochs: Epochs of linear warm-up from 0 to the peak; half a cosine to 0 follows.
        momentum: Nesterov momentum, in [0, 1).
        weight_decay: Weight decay of every parameter, including those of BatchNorm.
        label_smoothing: Label smoothing, in [0, 1).
        augmentation: ``paper`` (random resized crop, flip and RandAugment), ``crop`` (padded
            random crop and flip) or ``none``.

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
        check_fields(
            "recipe",
            self,
            (
                "batch_size",
                self.batch_size >= 2,  # noqa: PLR2004 (the last map may be a single pixel)
                "BatchNorm needs at least two images in a step",
            ),
            ("accumulation", self.accumulation >= 1, "a step has at least one micro-batch"),
            (
                "accumulation",
                self.accumulation <= self.batch_size,
                f"recipe.batch_size is {self.batch_size} and every micro-batch has an image",
            ),
            ("epochs", self.epochs >= 1, "a training has at least one epoch"),
            ("search_epochs", self.search_epochs >= 1, "a search has at least one epoch"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "it must be a number above 0"),
            (
                "warmup_epochs",
                0 <= self.warmup_epochs < math.inf,
                "it must be a number of at least 0",
            ),
            ("momentum", 0 <= self.momentum < 1, "it must be at least 0 and below 1"),
            (
                "weight_decay",
                0 <= self.weight_decay < math.inf,
                "it must be a number of at least 0",
            ),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "it must be at least 0 and below 1"),
            remedy="conf/recipe/paper.yaml has the paper's value",
        )

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.learning_rate * self.batch_size / 256


Backend = Literal["slice", "mask"]
"""How a supernet runs its subnets; see `widthopt.networks.supernet`."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Runtime options, which are not part of the identity of a run.

    Attributes:
        device: ``auto`` (an accelerator if there is one), or a torch device.
        workers: Processes that load images; 0 loads in the training process.
        precision: ``auto`` is bfloat16 autocast if the device is an accelerator that supports
            it, else float32.
        memory_format: ``auto`` is the faster memory format on the device.
        backend: How supernets run their subnets; ``auto`` is the faster backend in a short trial.
        progress: Whether to show a progress bar.
    """

    device: str
    workers: int
    precision: Literal["auto", "float32", "bfloat16"]
    memory_format: Literal["auto", "contiguous", "channels_last"]
    backend: Literal["auto", "slice", "mask"]
    progress: bool

    def __post_init__(self) -> None:
        check_value(
            "runtime.workers",
            self.workers,
            holds=self.workers >= 0,
            rule="it is a number of processes; use at least 0, which loads images in the training "
            "process",
        )


@dataclass(frozen=True, slots=True)
class Resources:
    """Cluster resources that differ from the launcher's; not part of the identity of a run.

    Attributes:
        search: Resources of a search by name; see ``conf/hydra/launcher/slurm.yaml``.
        train: Resources of a final training by name.
    """

    search: Mapping[str, Any]
    train: Mapping[str, Any]
