"""The supernet's training, which AutoSlim and DMCP share: the sandwich rule with distillation.

In every step the widest subnet learns the labels, and the narrowest and a few random ones learn
what the widest predicts. Their gradients are summed and the parameters updated once.

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
from widthopt.seeds import derived_seed, generator
from widthopt.setting import Backend, Runtime
from widthopt.training import distributed
from widthopt.training.devices import autocast, memory_format, resolve_device, to_device
from widthopt.training.loop import Objective
from widthopt.widthgraph import WidthGraph


logger = logging.getLogger("widthopt")

Reduction = Literal["sum", "mean"]
"""How the gradients of the subnets of a step combine; the sum is the published way."""

TRIAL_ROUNDS = 4
"""Rounds in which every way to run is timed, after one that is not."""

TRIAL_IMAGES = 16
"""Images at most in one pass of the trial."""

TRIAL = "trial.json"
"""Where a search's folder keeps what the trial came to."""

CLEARLY_FASTER = 0.95
"""Part of the default way's time that another must stay below to be chosen.

Ways differ in rounding, so a search should not flip between two that are about as fast.
"""


class Sandwich(Objective):
    """What one step of a supernet's training minimises.

    Attributes:
        supernet: The supernet.
        grids: Channel counts that subnets are drawn from.
        macs: MACs of all passes of the steps so far, of all images of all processes.
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
        """Prepare the first step.

        Args:
            supernet: The supernet.
            grids: As `widthopt.algorithms.grids` makes them.
            random_subnets: Random subnets in a step, beside the widest and the narrowest.
            reduction: How the gradients of a step's subnets combine.
            label_smoothing: Of the widest subnet's loss, in [0, 1).
            seed: What the draws depend on.
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
        """See `Objective.identity`: another grid, network or number of subnets is another."""
        return {
            **super().identity,
            "grids": {name: list(grid) for name, grid in self.grids.items()},
            "random_subnets": self._random_subnets,
            "share": self._share,
        }

    def begin_step(self, step: int, *, images: int) -> None:
        """Draw the step's random subnets; they follow from the seed and the step alone."""
        random = [self.draw(step, number) for number in range(self._random_subnets)]
        self._students = [self._narrowest, *random]
        self._losses, self._images = [], 0
        graph = self.supernet.graph
        self.macs += 3 * images * (graph.macs() + sum(map(graph.macs, self._students)))

    def draw(self, step: int, number: int) -> dict[str, int]:
        """One random subnet: every variable independently and uniformly over its grid.

        Source: specification of AutoSlim, D1 and D2.
        """
        random = generator(self.seed, "subnet", step, number)
        return {name: random.choice(grid) for name, grid in self.grids.items()}

    def backward(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, share: float
    ) -> tuple[Tensor, Tensor]:
        """See `Objective.backward`; the loss and logits are the widest subnet's.

        The others see no labels: they learn the widest's predictions, which are held still.
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
        """The losses of the step's other subnets, over this process's images."""
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
    """Mean cross-entropy of a student's predictions with a teacher's, at temperature 1.

    Its gradient is that of the Kullback-Leibler divergence, whose other part is the teacher's
    entropy.

    Args:
        logits: The student's, ``batch classes``.
        teacher: The teacher's probabilities, ``batch classes``.
    """
    return functional.cross_entropy(logits.float(), teacher)


def step_macs(graph: WidthGraph, grids: Grids, *, random_subnets: int) -> float:
    """MACs of one step for one image, as expected over the random subnets.

    Variables are drawn independently and no layer's cost is of higher degree than one in each,
    so the expected cost is that of the expected counts.
    """
    narrowest = {name: grid[0] for name, grid in grids.items()}
    mean = {name: sum(grid) / len(grid) for name, grid in grids.items()}
    return 3 * float(graph.macs() + graph.macs(narrowest) + random_subnets * graph.macs(mean))


def check_budget(
    graph: WidthGraph, grids: Grids, least_macs: int, budget_macs: int, *, enlarge: float
) -> None:
    """Raise unless a search can end between these MACs, which are the budget and its tolerance.

    Args:
        graph: The supernet's.
        grids: What each variable may have.
        least_macs: The budget, or what is close enough to it from below.
        budget_macs: The budget.
        enlarge: What made the supernet, for the message: the budget is not as it was typed.

    Raises:
        InputError: It lies below the narrowest subnet or not below the widest.
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
    """A supernet on its device with fresh weights, and the runtime that it is fastest under.

    What the runtime leaves open (how subnets run, the memory format) is timed once and kept in
    the folder, so that a search that is resumed goes on in the same way; of several processes
    the first decides. The trial's few passes are no part of the search's overhead.

    Args:
        blueprint: The network.
        context: What the search runs under.
        enlarge: Factor on the channels of the searchable variables.
        batch_size: Images in one pass.

    Raises:
        InputError: Switching channels off by BatchNorm does not remove them from this network.
    """
    runtime = context.runtime
    seed = derived_seed(context.seed, "search weights")
    supernet = Supernet(blueprint, enlarge=enlarge, seed=seed)
    device, _ = to_device(supernet.model, runtime)
    draws = torch.Generator().manual_seed(derived_seed(context.seed, "trial"))
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
    """How a supernet runs: the memory format, whether convolutions mix formats, the back-end."""

    memory_format: str
    mixed: bool
    backend: Backend

    def apply(self, supernet: Supernet, runtime: Runtime) -> Runtime:
        """Let the supernet run this way; the runtime that says so."""
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
    """The ways that a runtime leaves open, the usual one first."""
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
    """What an earlier trial came to; None without one, or where it is not open any more."""
    try:
        found = json.loads((folder / TRIAL).read_text("utf-8"))
        way = _Way(**found)
    except (OSError, TypeError, ValueError):
        return None
    device = resolve_device(runtime)
    return way if way in _ways(runtime, device) else None


def _fastest(
    supernet: Supernet, images: Tensor, channels: Mapping[str, int], runtime: Runtime
) -> _Way:
    """The usual way, or one that is clearly faster in turns with the others."""
    ways = _ways(runtime, images.device)
    if len(ways) == 1:
        return ways[0]
    rounds = []
    for _ in range(1 + TRIAL_ROUNDS):
        seconds = []
        for way in ways:
            taken = way.apply(supernet, runtime)
            seconds.append(_pass_seconds(supernet, images, channels, taken))
        rounds.append(seconds)
    for parameter in supernet.model.parameters():
        parameter.grad = None
    # The fastest pass of each: what else the machine does can only slow one down.
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
    """Seconds of a full pass and two passes of a subnet, forward and backward."""
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
