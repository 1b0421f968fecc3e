"""Training of the supernet for AutoSlim and DMCP: the sandwich rule with inplace distillation.

In every step the widest subnet is trained on the labels, and the narrowest and some random subnets
are trained on the predictions of the widest. The gradients are summed, and the optimizer makes one
step.

Source: Yu and Huang, 2019, "Universally Slimmable Networks and Improved Training Techniques",
sections 3.2 and 3.3.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from widthopt.algorithms import SearchContext
from widthopt.algorithms.grids import Grids
from widthopt.errors import InputError
from widthopt.files import write_atomically, writing
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet, check_maskable
from widthopt.seeds import derive_seed, generator
from widthopt.setting import Backend, Runtime
from widthopt.training import distributed
from widthopt.training.devices import autocast, memory_format, resolve_device, to_device
from widthopt.training.loop import Objective
from widthopt.widthgraph import WidthGraph


logger = logging.getLogger("widthopt")

Reduction = Literal["sum", "mean"]
"""Reduction of the gradients of a step's subnets; the paper uses the sum."""

TRIAL_ROUNDS = 4
"""Timed rounds of the trial, after one round of warm-up."""

TRIAL_IMAGES = 16
"""Largest batch of the trial."""

TRIAL = "trial.json"
"""File with the result of the trial in the folder of a search."""

CLEARLY_FASTER = 0.95
"""Another way to run is chosen only if it takes less than this fraction of the default's time.

Ways to run differ in rounding, so searches should not switch between equally fast ones.
"""


class Sandwich(Objective):
    """The loss of one step of a supernet's training.

    Attributes:
        supernet: The supernet.
        grids: Channel counts from which subnets are drawn.
        macs: MACs of all passes so far, over the images of all processes.
    """

    def __init__(
        self,
        supernet: Supernet,
        grids: Grids,
        *,
        random_subnets: int,
        reduction: Reduction,
        label_smoothing: float,
        seed: int,
    ) -> None:
        """Create the objective.

        Args:
            supernet: The supernet.
            grids: From `widthopt.algorithms.grids`.
            random_subnets: Random subnets in a step, in addition to the widest and the narrowest.
            reduction: Reduction of the gradients of a step's subnets.
            label_smoothing: Label smoothing of the loss of the widest subnet, in [0, 1).
            seed: Seed of the random subnets.
        """
        super().__init__(label_smoothing=label_smoothing)
        self.supernet, self.grids = supernet, grids
        self.macs = 0
        self.seed = seed
        self._random_subnets = random_subnets
        self._share = 1.0 if reduction == "sum" else 1 / (2 + random_subnets)
        self._narrowest = {name: grid[0] for name, grid in grids.items()}
        self._students: list[dict[str, int]] = []
        self._losses: list[Tensor] = []  # of the step's students, over the images so far
        self._images = 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Objective.identity`: includes the grids and the number of subnets."""
        return {
            **super().identity,
            "grids": {name: list(grid) for name, grid in self.grids.items()},
            "random_subnets": self._random_subnets,
            "share": self._share,
        }

    def begin_step(self, step: int, *, images: int) -> None:
        """Draw the random subnets of the step, which depend only on the seed and the step."""
        random = [self.draw(step, number) for number in range(self._random_subnets)]
        self._students = [self._narrowest, *random]
        self._losses, self._images = [], 0
        graph = self.supernet.graph
        self.macs += 3 * images * (graph.macs() + sum(map(graph.macs, self._students)))

    def draw(self, step: int, number: int) -> dict[str, int]:
        """Return a random subnet: each variable is uniform over its grid and independent.

        Source: docs/algorithms/autoslim.md, D1 and D2.
        """
        random = generator(self.seed, "subnet", step, number)
        return {name: random.choice(grid) for name, grid in self.grids.items()}

    def backward(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, share: float
    ) -> tuple[Tensor, Tensor]:
        """See `Objective.backward`. Returns the loss and logits of the widest subnet.

        The other subnets see no labels. They are trained on the predictions of the widest, through
        which no gradient flows.
        """
        del model  # it is the supernet's
        share *= self._share
        logits = self.supernet.full(images)
        loss = self.loss(logits, labels)
        self.backpropagate(loss, share=share)
        teacher = logits.detach().float().softmax(1)
        losses = []
        for channels in self._students:
            subnet = self.supernet.subnet(channels)
            student = distillation(subnet(images), teacher)
            self.backpropagate(student, share=share)
            subnet.collect()
            losses.append(student.detach() * len(labels))
        before = self._losses or [torch.zeros_like(loss) for loss in losses]
        self._losses = [total + loss for total, loss in zip(before, losses, strict=True)]
        self._images += len(labels)
        return loss.detach(), logits.detach()

    def step_metrics(self) -> dict[str, float]:
        """Return the losses of the other subnets of the step, over the images of this process."""
        names = ["narrowest", *(f"random_{index}" for index in range(1, len(self._losses)))]
        losses = torch.stack(self._losses) / self._images if self._losses else torch.zeros(0)
        return {f"loss_{name}": loss for name, loss in zip(names, losses.tolist(), strict=False)}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Objective.state_dict`."""
        return {"macs": torch.tensor(self.macs, dtype=torch.int64)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Objective.load_state_dict`."""
        self.macs = int(tensors["macs"])


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean cross-entropy between a teacher and a student, at temperature 1.

    Its gradient equals that of the Kullback-Leibler divergence, which differs by the entropy of
    the teacher.

    Args:
        logits: Logits of the student, of shape ``(batch, classes)``.
        teacher: Probabilities of the teacher, of shape ``(batch, classes)``.
    """
    return functional.cross_entropy(logits.float(), teacher)


def step_macs(graph: WidthGraph, grids: Grids, *, random_subnets: int) -> float:
    """Return the expected MACs of one step for one image.

    Variables are drawn independently, and the cost of a layer is linear in each of them, so the
    expected cost is the cost of the expected counts.
    """
    narrowest = {name: grid[0] for name, grid in grids.items()}
    mean = {name: sum(grid) / len(grid) for name, grid in grids.items()}
    return 3 * float(graph.macs() + graph.macs(narrowest) + random_subnets * graph.macs(mean))


def check_budget(
    graph: WidthGraph, grids: Grids, least_macs: int, budget_macs: int, *, enlarge: float
) -> None:
    """Check that the budget is between the narrowest and the widest subnet.

    Args:
        graph: The graph of the supernet.
        grids: Channel counts of each variable.
        least_macs: The budget less its tolerance.
        budget_macs: The budget.
        enlarge: Factor of the supernet, for the message.

    Raises:
        InputError: The budget is below the narrowest subnet, or not below the widest.
    """
    narrowest = graph.macs({name: grid[0] for name, grid in grids.items()})
    widest = graph.macs()
    if narrowest < least_macs and budget_macs < widest:
        return
    raise InputError(
        f"algorithm.enlarge is {enlarge:g}, but the subnets that are searched then take "
        f"{narrowest:,} to {widest:,} MACs and their budget, {budget_macs:,}, is not between; "
        "change it or budget_macs, which is the target's budget and scaled to what is searched"
    )


def prepare_supernet(
    blueprint: Blueprint, context: SearchContext, *, enlarge: float, batch_size: int
) -> tuple[Supernet, Runtime]:
    """Return a supernet with fresh weights on its device, and the runtime in which it is fastest.

    Settings that the runtime leaves open (backend, memory format) are chosen by a short timing
    trial. The choice is stored in the folder, so a resumed search runs in the same way; rank 0
    decides for all ranks. The passes of the trial do not count as overhead.

    Args:
        blueprint: The network.
        context: Context of the search.
        enlarge: Factor on the channels of the searchable variables.
        batch_size: Images in one pass.

    Raises:
        InputError: Masking channels with BatchNorm does not remove them from this network.
    """
    runtime = context.runtime
    seed = derive_seed(context.seed, "search weights")
    supernet = Supernet(blueprint, enlarge=enlarge, seed=seed)
    device, _ = to_device(supernet.model, runtime)
    draws = torch.Generator().manual_seed(derive_seed(context.seed, "trial"))
    side, count = supernet.graph.resolution, min(batch_size, TRIAL_IMAGES)
    images = torch.randn(max(2, count), 3, side, side, generator=draws).to(device)
    half = {
        name: max(variable.unit, variable.channels // (2 * variable.unit) * variable.unit)
        if name in supernet.graph.searchable
        else variable.channels
        for name, variable in supernet.graph.free.items()
    }
    check_maskable(supernet, images, half)
    way = _stored_trial(context.folder, runtime) or _fastest(supernet, images, half, runtime)
    way = distributed.broadcast(way, device=device)
    if distributed.rank() == 0:
        with writing(context.folder):
            context.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(context.folder / TRIAL, json.dumps(way._asdict()))
    return supernet, way.apply(supernet, runtime)


class _Way(NamedTuple):
    """A way to run a supernet: memory format, whether convolutions mix formats, and backend."""

    memory_format: str
    mixed: bool
    backend: Backend

    def apply(self, supernet: Supernet, runtime: Runtime) -> Runtime:
        """Configure the supernet, and return the runtime with these settings."""
        supernet.backend, supernet.mixed = self.backend, self.mixed
        last = self.memory_format == "channels_last"
        runtime = replace(
            runtime,
            backend=self.backend,
            memory_format="channels_last" if last else "contiguous",
        )
        to_device(supernet.model, runtime)
        return runtime


def _ways(runtime: Runtime, device: torch.device) -> list[_Way]:
    """Return the ways to run that a runtime leaves open, the default first."""
    last = memory_format(runtime, device) == torch.channels_last
    usual = "channels_last" if last else "contiguous"
    formats = [(usual, False)]
    if runtime.memory_format == "auto":
        formats = [("contiguous", True), *formats] if device.type == "cpu" else [
            *formats, ("contiguous", False)
        ]  # fmt: skip
    backends: list[Backend] = ["slice", "mask"]
    if runtime.backend != "auto":
        backends = [runtime.backend]
    return [_Way(*layout, backend) for layout in formats for backend in backends]


def _stored_trial(folder: Path, runtime: Runtime) -> _Way | None:
    """Return the result of an earlier trial, or None if the runtime no longer allows it."""
    try:
        way = _Way(**json.loads((folder / TRIAL).read_text("utf-8")))
    except (OSError, TypeError, ValueError):
        return None
    device = resolve_device(runtime)
    return way if way in _ways(runtime, device) else None


def _fastest(
    supernet: Supernet, images: Tensor, channels: Mapping[str, int], runtime: Runtime
) -> _Way:
    """Time all ways in turns; return the default, or one that is clearly faster."""
    ways = _ways(runtime, images.device)
    if len(ways) == 1:
        return ways[0]
    rounds = []
    for _ in range(1 + TRIAL_ROUNDS):
        seconds = []
        for way in ways:
            applied = way.apply(supernet, runtime)
            seconds.append(_pass_seconds(supernet, images, channels, applied))
        rounds.append(seconds)
    for parameter in supernet.model.parameters():
        parameter.grad = None
    # The minimum, because other load on the machine can only slow a pass down.
    least = [min(times) for times in zip(*rounds[1:], strict=True)]
    best = min(range(len(ways)), key=least.__getitem__)
    chosen = best if least[best] < CLEARLY_FASTER * least[0] else 0
    logger.debug(
        "seconds of a pass: %s; taken: %s", dict(zip(ways, least, strict=True)), ways[chosen]
    )
    return ways[chosen]


def _pass_seconds(
    supernet: Supernet, images: Tensor, channels: Mapping[str, int], runtime: Runtime
) -> float:
    """Return the seconds of a full pass and two passes of a subnet, forward and backward."""
    device = images.device
    images = images.contiguous(memory_format=memory_format(runtime, device))
    started = time.perf_counter()
    with autocast(runtime, device):
        loss = supernet.full(images).float().square().mean()
    loss.backward()
    for _ in range(2):
        subnet = supernet.subnet(channels)
        with autocast(runtime, device):
            loss = subnet(images).float().square().mean()
        loss.backward()
        subnet.collect()
    float(loss.detach())  # waits for the device
    return time.perf_counter() - started
