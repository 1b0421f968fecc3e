"""MorphNet's penalty on the scales of BatchNorm, in closed form on flat tensors.

A *slot* is one entry of the scale (gamma) of one BatchNorm. Slots that the topology ties form a
*class*; its scale is the largest of theirs. The penalty is the sum over width variables of the MACs
of one more channel, at the counts of classes now alive, times the sum of the scales of the
variable: ``R = sum_v dF/dn_v(alive) * rho_v``.

Source: Gordon et al., 2018, "MorphNet", sections 3 and 4; docs/algorithms/morphnet.md, 1.3-1.5.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from widthopt.algorithms import check_searchable
from widthopt.algorithms.polynomial import Polynomial
from widthopt.widthgraph import WidthGraph


class Scales(NamedTuple):
    """The current scales, by slot, class and width variable.

    Attributes:
        flat: Absolute scale of every slot, in the order of the BatchNorms.
        classes: Scale of each class.
        alive: Whether each class is alive.
        counts: Number of classes alive in each free width variable; all if it has no scales.
        sums: Sum of ``classes`` over each free width variable.
    """

    flat: Tensor
    classes: Tensor
    alive: Tensor
    counts: Tensor
    sums: Tensor


class Penalty:
    """The penalty of one network. It reads the scales and adds to their gradients.

    Attributes:
        graph: The network's graph.
        macs: MACs of the network, F0; the penalty is relative to it.
        variables: Names of the free width variables, in the order of the vectors.
        searchable: Names of the variables that have scales.
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
        """Create the index tensors on the device of the model.

        Args:
            model: The network that ``graph`` describes.
            graph: Its graph.
            threshold: A class is alive if its scale is above this.
            tie: Scale of a class: ``max``, the largest of its slots, or ``l2``, their norm.
            depthwise: ``double`` charges depthwise and grouped layers on their input side too.

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
        # Steps of a scale are too small for half precision; float64 stays.
        dtype = torch.promote_types(self._gammas[0].dtype, torch.float32)
        self._kept = torch.tensor(kept, device=device, dtype=dtype)
        slopes, curvature = _polynomial(graph, row, self.macs, depthwise=depthwise)
        self._slopes = slopes.to(device, dtype)
        self._curvature = curvature.to(device, dtype)

    @torch.no_grad()
    def scales(self) -> Scales:
        """Return the current scales."""
        flat = torch.cat(self._gammas).to(self._slopes.dtype).abs()
        count = len(self._class_row)
        classes = flat.new_zeros(count)
        if self._tie == "max":
            classes = classes.scatter_reduce_(0, self._slot_class, flat, "amax")
        else:
            classes = classes.index_add_(0, self._slot_class, flat.square()).sqrt_()
        # A class of a fixed variable is always alive and has no penalty.
        alive = (classes > self._threshold) | ~self._class_free
        charged = self._class_free.to(flat.dtype)
        counts = self._kept.index_add(0, self._class_row, alive.to(flat.dtype) * charged)
        sums = torch.zeros_like(counts).index_add_(0, self._class_row, classes * charged)
        return Scales(flat, classes, alive, counts, sums)

    @torch.no_grad()
    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return R/F0, a scalar, and its gradient by slot.

        No gradient flows through the counts, which are step functions. Slots of a class that are
        equal to its maximum share the gradient evenly. A scale of zero has no gradient.
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
    def add_gradient(self, strength: float | Tensor) -> Tensor:
        """Add ``strength`` times the gradient of R/F0 to the gradients of the scales; return R/F0.

        Call this once per step, after the gradients of all micro-batches. It does not synchronize
        with the device.
        """
        value, gradient = self.value_and_gradient()
        gradients = [_gradient(gamma) for gamma in self._gammas]
        if isinstance(strength, Tensor):
            gradient = gradient * strength.to(gradient.dtype)
            torch._foreach_add_(gradients, gradient.split(self._sizes))
        else:
            torch._foreach_add_(gradients, gradient.split(self._sizes), alpha=strength)
        return value

    @torch.no_grad()
    def soft_counts(self) -> Tensor:
        """Return the soft count of each free width variable, of shape ``(variables,)``.

        The soft count is the sum of the scales of the classes divided by the largest of them. It is
        at least 1, and a common factor on the scales of a layer, which the next BatchNorm cancels,
        does not change it. Variables without scales have all their classes.
        """
        scales = self.scales()
        largest = scales.classes.new_zeros(len(self.variables)).scatter_reduce_(
            0, self._class_row, scales.classes * self._class_free, "amax"
        )
        return self._kept + scales.sums / largest.clamp_min(torch.finfo(largest.dtype).tiny)

    @torch.no_grad()
    def truncate(self) -> Tensor:
        """Set the scales and shifts of every dead class to 0, and return the mask of dead slots.

        Deviation: MorphNet's code does not do this during a search. Without it, the accuracy at
        the end is that of a network that still has the channels (docs/algorithms/morphnet.md, D5).
        """
        dead = ~self.scales().alive[self._slot_class]
        for gamma, beta, mask in zip(
            self._gammas, self._betas, dead.split(self._sizes), strict=True
        ):
            gamma.masked_fill_(mask, 0)
            beta.masked_fill_(mask, 0)
        return dead

    def counts(self, *, relative: bool = False) -> dict[str, int]:
        """Return the number of classes alive in each free width variable.

        Args:
            relative: Use the threshold times ``min(1, largest scale of the variable)``. All scales
                of a layer can shrink without an effect on the loss, because the next BatchNorm
                normalizes them; the absolute threshold then marks the layer as dead.
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
        """Return the largest scale of each searchable width variable."""
        scales = self.scales()
        largest = scales.classes.new_zeros(len(self.variables)).scatter_reduce_(
            0, self._class_row, scales.classes * self._class_free, "amax"
        )
        values = dict(zip(self.variables, largest.tolist(), strict=True))
        return {name: values[name] for name in self.searchable}

    def pressure(self) -> dict[str, float]:
        """Return the current gradient of R/F0 on one class of each searchable variable."""
        weights = self._slopes + self._curvature @ self.scales().counts
        values = dict(zip(self.variables, weights.tolist(), strict=True))
        return {name: values[name] for name in self.searchable}

    def members(self) -> dict[str, int]:
        """Return the number of slots in a class of each searchable width variable."""
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
        """Number of classes with both dead and living slots."""
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
    """Return slopes and curvature of F/F0 with respect to the class counts, in float64.

    Interpretation: MorphNet's code charges a depthwise layer on both of its sides although its cost
    has one factor; grouped layers are treated in the same way (docs/algorithms/morphnet.md, D10).
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
