"""Shared by tests: builders of settings and recipes, a small network, images, a count of MACs."""

import dataclasses
import math
import signal
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from widthopt.data.digits import Digits
from widthopt.networks import TorchvisionNetwork
from widthopt.setting import Recipe, Runtime, Setting


RUNTIME = Runtime(
    device="cpu",
    workers=0,
    precision="float32",
    memory_format="contiguous",
    backend="slice",
    progress=False,
)
"""On the CPU; every value is fixed, so that a supernet needs no timing trial."""

RECIPE = Recipe(
    batch_size=16,
    accumulation=1,
    epochs=3,
    search_epochs=3,
    learning_rate=1.6,  # a peak of 0.1 for 16 images
    warmup_epochs=1,
    momentum=0.9,
    weight_decay=5e-5,
    label_smoothing=0.1,
    augmentation="none",
)


def make_runtime(**changes):
    """Return `RUNTIME` with changes."""
    return dataclasses.replace(RUNTIME, **changes)


def make_recipe(**changes):
    """Return `RECIPE` with changes."""
    return dataclasses.replace(RECIPE, **changes)


def make_setting(network=None, **changes):
    """Return the setting of a network at 8 pixels with 4 classes, or with changes.

    Args:
        network: `SmallNetwork` by default; a string is the name of one of torchvision's networks.
        changes: Other axes of the setting.
    """
    if isinstance(network, str):
        network = TorchvisionNetwork(network)
    axes = {"classes": 4, "width": 1.0, "depth": 1, "resolution": 8, "fraction": 1.0}
    return Setting(network or SmallNetwork(), **(axes | changes))


class Small(nn.Module):
    """A stem with a residual block, then a chain: strided, depthwise and pointwise.

    Its variables: ``stem`` (a residual stream), ``inner`` (inside a residual block), ``down``
    (tied to the depthwise layer) and ``wide``.
    """

    def __init__(self, classes, start=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.back = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.bn4 = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 10, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, classes)
        self._start = start

    def forward(self, x):
        x = functional.relu(self.bn0(self.stem(x)))
        x = functional.relu(x + self.bn2(self.back(functional.relu(self.bn1(self.inner(x))))))
        x = functional.relu(self.bn4(self.deep(functional.relu(self.bn3(self.down(x))))))
        x = functional.relu(self.bn5(self.wide(x)))
        return self.head(x.mean((2, 3)))

    def reset_parameters(self):
        """Initialise the weights; `start` changes them afterwards."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self._start is not None:
            with torch.no_grad():
                self._start(self)


@dataclass(frozen=True)
class SmallNetwork:
    """`Small` as the network of a setting."""

    start: object = None
    name: str = "small"

    def build(self, *, depth, classes):
        assert depth == 1
        return Small(classes, self.start)

    def stages(self, model):  # noqa: ARG002
        return []

    @property
    def rules(self):
        return {}


class Synthetic:
    """64 images of 4 classes: a pattern for each class plus noise, shuffled in each epoch.

    Args:
        batch_size: Images in a batch.
        interrupt: The step before which Ctrl-C is pressed.
        spoilt: The step whose first image is NaN.
    """

    images, classes = 64, 4

    def __init__(self, batch_size=16, interrupt=None, spoilt=None):
        random = torch.Generator().manual_seed(0)
        patterns = torch.randn(4, 3, 8, 8, generator=random)
        self.labels = torch.arange(64) % 4
        self.pixels = patterns[self.labels] + torch.randn(64, 3, 8, 8, generator=random)
        self.batch_size = batch_size
        self.steps_per_epoch = 64 // batch_size
        self.interrupt, self.spoilt = interrupt, spoilt

    def epoch(self, epoch, first_step=0, rank=0, ranks=1):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
        part = slice(rank * self.batch_size // ranks, (rank + 1) * self.batch_size // ranks)
        for step, indices in enumerate(batch[part] for batch in order.split(self.batch_size)):
            if step >= first_step:
                number = epoch * self.steps_per_epoch + step
                if number == self.interrupt:
                    signal.raise_signal(signal.SIGINT)
                pixels = self.pixels[indices]
                if number == self.spoilt:
                    pixels[0] = torch.nan
                yield pixels, self.labels[indices]

    def __iter__(self):
        return self.epoch(0)

    def part(self, rank, ranks):
        return ListedBatches([(self.pixels[rank::ranks], self.labels[rank::ranks])])

    def sample(self, images, *, batch_size, seed):
        """As `EvaluationBatches.sample`: images in random order, in batches."""
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:images]
        batches = order.split(batch_size)
        return ListedBatches((self.pixels[batch], self.labels[batch]) for batch in batches)


class ListedBatches(list):
    """Batches of images and labels in a list, for evaluation or for recalibration."""

    @property
    def images(self):
        return sum(len(labels) for _, labels in self)

    @property
    def batch_size(self):
        return len(self[0][1])

    @property
    def steps_per_epoch(self):
        return len(self)

    def epoch(self, _epoch, **_):
        return iter(self)

    def share(self, rank, ranks):
        return ListedBatches(self[rank::ranks])


class Instrument:
    """Counts the MACs of every convolution and linear layer that runs.

    A forward pass counts once, the gradients of the input and of the weight once each.
    """

    def __enter__(self):
        self.total = 0
        self._handle = nn.modules.module.register_module_forward_hook(self._count)
        return self

    def __exit__(self, *_):
        self._handle.remove()

    def _count(self, module, _inputs, output):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not output.is_meta:
            positions = len(output) * math.prod(output.shape[2:])
            passes = 1
            if torch.is_grad_enabled():
                passes = 3 if module.weight.requires_grad else 2
            self.total += passes * positions * module.weight.numel()


def digits():
    return Digits(
        name="digits",
        resolution=8,
        mean=(0.3053,) * 3,
        std=(0.3763,) * 3,
        crop=1.0,
        flip=False,
        train_scale=None,
        validation=0.2,
        memory_limit_gb=1.0,
    )
