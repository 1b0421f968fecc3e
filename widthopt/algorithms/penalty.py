"""MorphNet's penalty on the scales of BatchNorm, in closed form on flat tensors.

A *slot* is one entry of one BatchNorm's scale (gamma). Slots that the topology ties form a
class; the largest of them says how alive it is. The penalty is the sum over width variables
of the MACs that one more channel would add at the channel counts now alive, times the sum of
the variable's scales: ``R = sum_v dF/dn_v(alive) * rho_v``.

Source: Gordon et al., 2018, "MorphNet", sections 3 and 4; specification of MorphNet, 1.3-1.5.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from widthopt.algorithms import check_searchable
from widthopt.algorithms.polynomial import Polynomial
from widthopt.widthgraph import WidthGraph


class Scales(NamedTuple):
    """The scales at one moment, by class and by width variable.

    Attributes:
        flat: The size of every slot, in the order of the norms.
        classes: How alive each class is.
        alive: Whether each class is.
        counts: Classes alive in each free width variable; all of them where it has no scales.
        sums: Sum of ``classes`` over each free width variable.
    """

    flat: Tensor
    classes: Tensor
    alive: Tensor
    counts: Tensor
    sums: Tensor


class Penalty:
    """The penalty of one network, whose scales it reads and whose gradients it adds to.

    Attributes:
        graph: The network's graph.
        macs: MACs of the whole network, F0; the penalty is relative to it.
        variables: Names of the free width variables, in the order of all vectors here.
        searchable: Those that have scales.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: WidthGraph,
        *,
        threshold: float,
        tie: Literal["max", "l2"],
        depthwise: Literal["double", "single"],
    ) -> None:
        """Lay out the index tensors, on the device of the model.

        Args:
            model: The network that ``graph`` describes.
            graph: Its graph.
            threshold: A class is alive if its scale is strictly above this.
            tie: The scale of a class: the largest of its slots, or their Euclidean norm.
            depthwise: Charge depthwise and grouped layers for their input side too.

        Raises:
            InputError: The network has no BatchNorm with scales on a free width variable.
        """
        check_searchable(graph, algorithm="morphnet")
        self.graph = graph
        self._threshold, self._tie = threshold, tie
        self.macs = graph.macs()
        self.variables = list(graph.free)
        rows = [index for index, variable in enumerate(graph.variables) if variable.free]
        row = {index: place for place, index in enumerate(rows)}
        norms = [model.get_submodule(name) for name in graph.scale_axes]
        self._gammas: list[Tensor] = [_parameter(norm, "weight") for norm in norms]
        self._betas: list[Tensor] = [_parameter(norm, "bias") for norm in norms]
        classes: dict[tuple[int, int], int] = {}
        slots: list[int] = []
        for axis in graph.scale_axes.values():
            for run in axis:
                for number in range(run.start, run.start + run.classes):
                    index = classes.setdefault((run.variable, number), len(classes))
                    slots.extend([index] * run.repeat)
        free = [(row.get(variable, 0), variable in row) for variable, _ in classes]
        device = self._gammas[0].device
        self._sizes = [gamma.numel() for gamma in self._gammas]
        self._slot_class = torch.tensor(slots, device=device)
        self._class_row = torch.tensor([place for place, _ in free], device=device)
        self._class_free = torch.tensor([is_free for _, is_free in free], device=device)
        self.searchable = [name for name in self.variables if graph.scale_slices(name)]
        kept = [
            0.0 if name in self.searchable else float(graph.free[name].classes)
            for name in self.variables
        ]
        # Half precision would lose the steps of a scale; float64 is kept.
        dtype = torch.promote_types(self._gammas[0].dtype, torch.float32)
        self._kept = torch.tensor(kept, device=device, dtype=dtype)
        slopes, curvature = _polynomial(graph, row, self.macs, depthwise=depthwise)
        self._slopes = slopes.to(device, dtype)
        self._curvature = curvature.to(device, dtype)

    @torch.no_grad()
    def scales(self) -> Scales:
        """The scales as they are now."""
        flat = torch.cat(self._gammas).to(self._slopes.dtype).abs()
        count = len(self._class_row)
        classes = flat.new_zeros(count)
        if self._tie == "max":
            classes = classes.scatter_reduce_(0, self._slot_class, flat, "amax")
        else:
            classes = classes.index_add_(0, self._slot_class, flat.square()).sqrt_()
        # A class of a fixed variable is always alive and never charged.
        alive = (classes > self._threshold) | ~self._class_free
        charged = self._class_free.to(flat.dtype)
        counts = self._kept.index_add(0, self._class_row, alive.to(flat.dtype) * charged)
        sums = torch.zeros_like(counts).index_add_(0, self._class_row, classes * charged)
        return Scales(flat, classes, alive, counts, sums)

    @torch.no_grad()
    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """R/F0 (no axes), and its gradient by slot.

        The alive counts are steps, so no gradient flows through them. Members of a class that
        share its maximum share the gradient evenly. A scale of zero has none.
        """
        with torch.autocast(self._slopes.device.type, enabled=False):
            scales = self.scales()
            weights = self._slopes + self._curvature @ scales.counts
            value = weights @ scales.sums
            push = weights[self._class_row] * self._class_free
            size = scales.classes[self._slot_class]
            if self._tie == "max":
                wins = (scales.flat == size).to(size.dtype)
                ties = torch.zeros_like(scales.classes).index_add_(0, self._slot_class, wins)
                share = wins * (push / ties)[self._slot_class]
            else:
                share = push[self._slot_class] * (scales.flat / size.clamp_min(1e-30))
            return value, share * torch.cat(self._gammas).sign()

    @torch.no_grad()
    def add_gradient(self, strength: float) -> Tensor:
        """Add ``strength`` times the gradient of R/F0 to the scales' gradients; R/F0, no axes.

        Called once in a step, when the gradients of all its images are there. Nothing here
        waits for the device.
        """
        value, gradient = self.value_and_gradient()
        gradients = [_gradient(gamma) for gamma in self._gammas]
        torch._foreach_add_(gradients, gradient.split(self._sizes), alpha=strength)
        return value

    @torch.no_grad()
    def truncate(self) -> Tensor:
        """Set scale and shift of all members of every dead class to 0; which slots are dead.

        Deviation: MorphNet's own code never does this while it searches; without it the
        accuracy at the end belongs to a network that still has the channels (specification,
        decision D5).
        """
        dead = ~self.scales().alive[self._slot_class]
        for gamma, beta, mask in zip(
            self._gammas, self._betas, dead.split(self._sizes), strict=True
        ):
            gamma.masked_fill_(mask, 0)
            beta.masked_fill_(mask, 0)
        return dead

    def counts(self, *, relative: bool = False) -> dict[str, int]:
        """Classes alive in each free width variable.

        Args:
            relative: Compare with the threshold times ``min(1, largest scale in the variable)``:
                a whole layer can shrink at no cost to the task, because the next BatchNorm
                undoes it, and the absolute threshold then calls it dead.
        """
        scales = self.scales()
        alive = scales.alive
        if relative:
            rows = len(self.variables)
            largest = scales.classes.new_zeros(rows).scatter_reduce_(
                0, self._class_row, scales.classes * self._class_free, "amax"
            )
            bound = self._threshold * largest.clamp_max(1)[self._class_row]
            alive = (scales.classes > bound) | ~self._class_free
        living = (alive & self._class_free).to(self._kept.dtype)
        counts = self._kept.index_add(0, self._class_row, living)
        return dict(zip(self.variables, map(int, counts.tolist()), strict=True))

    def largest(self) -> dict[str, float]:
        """The largest scale in each searchable width variable."""
        scales = self.scales()
        largest = scales.classes.new_zeros(len(self.variables)).scatter_reduce_(
            0, self._class_row, scales.classes * self._class_free, "amax"
        )
        values = dict(zip(self.variables, largest.tolist(), strict=True))
        return {name: values[name] for name in self.searchable}

    def pressure(self) -> dict[str, float]:
        """Gradient of R/F0 on one whole class of each searchable variable, as it is now."""
        weights = self._slopes + self._curvature @ self.scales().counts
        values = dict(zip(self.variables, weights.tolist(), strict=True))
        return {name: values[name] for name in self.searchable}

    def members(self) -> dict[str, int]:
        """Slots in one class of each searchable width variable."""
        per_class = torch.bincount(self._slot_class, minlength=len(self._class_row)).tolist()
        return {
            self.variables[row]: slots
            for row, slots, is_free in zip(
                self._class_row.tolist(), per_class, self._class_free.tolist(), strict=True
            )
            if is_free
        }

    @property
    def mixed(self) -> int:
        """Classes with both dead and living slots: in a series chain these are dead in effect."""
        scales = self.scales()
        living = (scales.flat > self._threshold).to(scales.classes.dtype)
        count = torch.zeros_like(scales.classes).index_add_(0, self._slot_class, living)
        total = torch.bincount(self._slot_class, minlength=len(self._class_row))
        return int(((count > 0) & (count < total)).sum())


def _parameter(norm: nn.Module, name: str) -> nn.Parameter:
    parameter = getattr(norm, name)
    assert isinstance(parameter, nn.Parameter)
    return parameter


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _polynomial(
    graph: WidthGraph, row: dict[int, int], macs: int, *, depthwise: Literal["double", "single"]
) -> tuple[Tensor, Tensor]:
    """Slopes and curvature of F/F0 in the class counts, in float64.

    Reading: MorphNet's code charges a depthwise layer on both of its sides although its cost
    has one factor; grouped layers are treated alike (specification, decision D10).
    """
    macs_of = Polynomial.of(graph)
    slopes = macs_of.slopes.clone()
    curvature = macs_of.curvature + 2 * torch.diag(macs_of.squares)
    one_sided: Sequence[str] = ("depthwise", "grouped") if depthwise == "double" else ()
    for layer in graph.layers:
        if layer.kind in one_sided:
            for index, entries in graph.form(layer.writes).items():
                if index in row:
                    slopes[row[index]] += layer.coefficient * entries
    return slopes / macs, curvature / macs
