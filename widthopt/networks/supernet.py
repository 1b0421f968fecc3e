"""A traced network that runs at any channel counts up to its own.

A *supernet* is the network with its searchable width variables enlarged; a *subnet* is the
same network at fewer channels, with the leading channels of the supernet's weights. It runs
in one of two ways that compute the same: ``slice`` uses just those entries of the weights,
``mask`` runs all channels and multiplies BatchNorm's scale and shift by 0 where a channel is
off, which is exactly BatchNorm's output times 0. The same fold takes real factors, for a
mixture of widths.

Every forward pass normalises with the statistics of its own batch: statistics that run over
passes of different widths would fit none of them, so the supernet keeps none. Nothing is drawn
in a pass either (dropout is off), so that both ways agree.

Source: Yu and Huang, 2019, "Universally Slimmable Networks"; Guo et al., 2020, "DMCP"; the
specifications of AutoSlim, 1.3 and 1.4, and of DMCP, 1.4 and 4.2.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widthopt.errors import InputError
from widthopt.networks.resize import Blueprint, selected_entries, selection_name, tensor_axes
from widthopt.setting import Backend
from widthopt.training.devices import wrong_in_channels_last
from widthopt.widthgraph import Axis, WidthGraph


ScaleSite = Literal["norm", "activation"]
"""Where the factors of a mixture act: behind BatchNorm, or behind the activation after it."""

Extent = int | Tensor
"""What an axis keeps: its first so many entries, or the entries at these places."""


class _Slot(NamedTuple):
    """Where a parameter is kept, and which of its dimensions are channel axes."""

    parameter: nn.Parameter
    owner: dict[str, Any]
    key: str
    axes: tuple[tuple[int, Axis], ...]


class _Grouped(NamedTuple):
    """A depthwise or grouped convolution: its module, input axis and inputs of one group."""

    module: nn.Module
    reads: Axis
    per_group: int


def enlarge_channels(graph: WidthGraph, factor: float) -> dict[str, int]:
    """Channels of a network whose searchable variables are a factor wider.

    Reading: a variable without a BatchNorm (a squeeze layer, for example) cannot be searched;
    it is not enlarged and keeps a multiplier of 1.

    Source: paper appendix A, "We enlarge the network by 1.5x".
    """
    searchable = set(graph.searchable)
    return {
        name: one.unit * round(factor * one.classes) if name in searchable else one.channels
        for name, one in graph.free.items()
    }


class Supernet:
    """The enlarged network of a setting, and its weights.

    Attributes:
        model: The network at its full width; its own forward pass is the widest subnet's.
        graph: Its graph: the searchable variables enlarged, the others as they are.
        base: The graph of the un-enlarged network N, which multipliers refer to.
        backend: How subnets run.
        mixed: Whether every convolution gets its input in the memory format that is fastest for
            it on a CPU, rather than in that of the images.
    """

    def __init__(
        self, blueprint: Blueprint, *, enlarge: float, seed: int, backend: Backend = "slice"
    ) -> None:
        """Build it with fresh weights.

        Args:
            blueprint: The network.
            enlarge: Factor on the channels of its searchable variables, from 1 up.
            seed: What the weights depend on.
            backend: How subnets run.
        """
        self.base = blueprint.graph
        self.graph = blueprint.resize_graph(enlarge_channels(self.base, enlarge))
        self.model = blueprint.build(self.graph.channels, seed=seed)
        self.backend: Backend = backend
        self.mixed = False
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
            elif isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(self._laid_out)
        axes = tensor_axes(self.model, self.graph)
        self._slots: dict[str, _Slot] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            path, _, key = name.rpartition(".")
            owner = self.model.get_submodule(path)._parameters  # noqa: SLF001 (see `replace_parameters`)
            self._slots[name] = _Slot(parameter, owner, key, tuple(axes.get(name, {}).items()))
        self._grouped = [
            _Grouped(module, layer.reads, module.in_channels // module.groups)
            for layer in self.graph.layers
            if layer.kind != "dense"
            and isinstance(module := self.model.get_submodule(layer.name), nn.modules.conv._ConvNd)  # noqa: SLF001
        ]
        self._layer_norms = [
            (module, norm.axis)
            for norm in self.graph.norms
            if isinstance(module := self.model.get_submodule(norm.name), nn.LayerNorm)
        ]
        self._norms = tuple(dict.fromkeys(one.name for one in self.graph.norms if one.gamma))
        self._places = torch.tensor(list(self._class_numbers()))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def full(self, images: Tensor) -> Tensor:
        """Logits of the widest subnet, ``batch classes``; gradients go to the parameters."""
        self._draw_nothing()
        logits: Tensor = self.model(images)
        return logits

    def subnet(self, channels: Mapping[str, int], *, backend: Backend | None = None) -> "Subnet":
        """The subnet at these channel counts, ready to run once and to learn.

        Args:
            channels: Count of each free width variable, at most the supernet's.
            backend: How it runs; the supernet's own way if None.
        """
        masked = (backend or self.backend) == "mask"
        return _Masked(self, channels) if masked else _Sliced(self, channels)

    def mixture(self, images: Tensor, factors: Tensor, *, site: ScaleSite = "norm") -> Tensor:
        """Logits of the whole supernet with every channel times a factor, ``batch classes``.

        A factor acts behind every BatchNorm that its channel passes. Gradients go to the factors
        alone; those of the weights are not computed.

        Args:
            images: ``batch 3 height width``.
            factors: One for each class of the searchable variables, in the order of
                `WidthGraph.searchable`; at most 1 if they act behind activations.
            site: Whether they act before an activation or behind it. It is the same but for
                ReLU6, which clips what it gets; it has to be a module that reads a BatchNorm.

        Source: Guo et al., 2020, "DMCP", section 3.2; specification of DMCP, 1.4 and D7.
        """
        weights = {name: slot.parameter.detach() for name, slot in self._slots.items()}
        self._draw_nothing()
        with (
            self.replace_parameters({**weights, **self.fold_batchnorm(factors, learn=False)}),
            self._clipping(factors if site == "activation" else None),
        ):
            logits: Tensor = self.model(images)
        return logits

    def fold_batchnorm(self, factors: Tensor, *, learn: bool) -> dict[str, Tensor]:
        """BatchNorm scales and shifts times the factors of their channels, by name.

        Args:
            factors: As for `mixture`.
            learn: Whether gradients go to the scales and shifts too.
        """
        # All norms at once: one product in the place of two for every layer.
        spread = self._spread(factors)
        tensors: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in self._norms]
            own: list[Tensor] = [self._slots[name].parameter for name in names]
            flat = torch.cat(own) if learn else torch.cat(own).detach()
            sizes = [one.numel() for one in own]
            tensors |= zip(names, (flat * spread.to(flat.dtype)).split(sizes), strict=True)
        return tensors

    def _spread(self, factors: Tensor) -> Tensor:
        """The factor of every entry of every BatchNorm scale, one norm after the other."""
        self._places = self._places.to(factors.device)
        return torch.cat([factors, factors.new_ones(1)])[self._places]

    @contextmanager
    def _clipping(self, factors: Tensor | None) -> Iterator[None]:
        """Let a ReLU6 behind a BatchNorm clip at its factors' part of 6.

        So ``min(relu(s z), 6 s) = s relu6(z)``: the factors act behind it, though they are folded.

        Args:
            factors: As for `mixture`; none to let it clip as ever.
        """
        if factors is None:
            yield
            return
        sizes = [self._slots[f"{name}.weight"].parameter.numel() for name in self._norms]
        limits = (6 * self._spread(factors)).split(sizes)
        normalised: list[tuple[Tensor, Tensor]] = []  # the last that came from a BatchNorm

        def note(limit: Tensor, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            normalised[:] = [(output, limit.view(-1, *[1] * (output.dim() - 2)))]

        def clip(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            found = [limit for one, limit in normalised if one is inputs[0]]
            return torch.minimum(output, found[0].to(output.dtype)) if found else output

        hooks = [
            self.model.get_submodule(name).register_forward_hook(partial(note, limit))
            for name, limit in zip(self._norms, limits, strict=True)
        ]
        hooks += [
            module.register_forward_hook(clip)
            for module in self.model.modules()
            if isinstance(module, nn.ReLU6)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def extents(self, channels: Mapping[str, int]) -> dict[Axis, Extent]:
        """What every channel axis keeps at these counts: the leading classes of each variable."""
        counts = {
            index: channels[variable.name] // variable.unit
            for index, variable in enumerate(self.graph.variables)
            if variable.free
        }
        axes = {axis for slot in self._slots.values() for _, axis in slot.axes}
        axes |= {one.reads for one in self._grouped} | {axis for _, axis in self._layer_norms}
        return {axis: _extent(axis, counts) for axis in axes}

    def slice_weights(self, extents: Mapping[Axis, Extent]) -> dict[str, Tensor]:
        """The weights of a subnet by name, detached; views of the supernet's where possible.

        They are the parameters of `Blueprint.build` at these counts.
        """
        return {
            name: _select_entries(slot.parameter.detach(), slot.axes, extents)
            for name, slot in self._slots.items()
        }

    @contextmanager
    def replace_parameters(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the network compute with other tensors in the place of its parameters.

        As ``torch.func.functional_call``, but without a walk over all modules in every pass.
        """
        try:
            for name, tensor in tensors.items():
                slot = self._slots[name]
                slot.owner[slot.key] = tensor
            yield
        finally:
            for name in tensors:
                slot = self._slots[name]
                slot.owner[slot.key] = slot.parameter

    @contextmanager
    def resize_forward(
        self, channels: Mapping[str, int], extents: Mapping[Axis, Extent]
    ) -> Iterator[None]:
        """Let the forward code be that of a subnet: its groups, its selections of channels."""
        values: list[tuple[nn.Module, str, object]] = [
            (one.module, "groups", _length(extents[one.reads]) // one.per_group)
            for one in self._grouped
        ]
        values += [
            (module, "normalized_shape", (_length(extents[axis]),))
            for module, axis in self._layer_norms
        ]
        if any(one.kind == "select" for one in self.graph.rewrites):
            leading = {n: range(channels[n] // v.unit) for n, v in self.graph.free.items()}
            small = self.graph.resize_graph(channels, keep=leading)
            for number, rewrite in enumerate(small.rewrites):
                if rewrite.kind == "select":
                    places = torch.tensor(selected_entries(rewrite), device=self.device)
                    values.append((self.model, selection_name(number), places))
        before = [(module, key, getattr(module, key)) for module, key, _ in values]
        try:
            for module, key, value in values:
                setattr(module, key, value)
            yield
        finally:
            for module, key, value in before:
                setattr(module, key, value)

    def gather(self, gradients: Mapping[str, Tensor], extents: Mapping[Axis, Extent]) -> None:
        """Add the gradients of a slice's weights to the gradients of the supernet's."""
        targets, additions = [], []
        for name, gradient in gradients.items():
            slot = self._slots[name]
            if slot.parameter.grad is None:
                slot.parameter.grad = torch.zeros_like(slot.parameter)
            kept = [(dim, extents[axis]) for dim, axis in slot.axes]
            if all(isinstance(extent, int) for _, extent in kept):
                targets.append(_select_entries(slot.parameter.grad, slot.axes, extents))
                additions.append(gradient)
            else:
                _scatter(slot.parameter.grad, dict(kept), gradient)
        torch._foreach_add_(targets, additions)

    def _laid_out(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The input of a convolution in its own memory format, if formats are mixed."""
        if not self.mixed:
            return None
        weight = module.weight
        assert isinstance(weight, Tensor)
        channels = max(weight.shape[0], weight.shape[1])
        last = channels <= _LAST_CHANNELS or weight.shape[2:].numel() == 1 or weight.shape[1] == 1
        last = last and not wrong_in_channels_last(module)
        layout = torch.channels_last if last else torch.contiguous_format
        return tuple(one.contiguous(memory_format=layout) for one in inputs)

    def _draw_nothing(self) -> None:
        """Turn off what draws. BatchNorm still takes its batch's statistics: it has no others."""
        if self.model.training:
            self.model.eval()

    def _class_numbers(self) -> Iterator[int]:
        """For every entry of every BatchNorm scale, the number of its class.

        The classes of the searchable variables are numbered through; the number after the last
        is for all that is fixed.
        """
        starts: dict[int, int] = {}
        total = 0
        index = {one.name: place for place, one in enumerate(self.graph.variables)}
        for name in self.graph.searchable:
            starts[index[name]] = total
            total += self.graph.free[name].classes
        axes = {one.name: one.axis for one in self.graph.norms if one.gamma}
        for name in self._norms:
            for run in axes[name]:
                start = starts.get(run.variable)
                for number in range(run.start, run.start + run.classes):
                    yield from [total if start is None else start + number] * run.repeat


class Subnet:
    """A subnet that runs one pass: call it, go backward, then `collect` its gradients."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, ``batch classes``."""
        raise NotImplementedError

    def collect(self) -> None:
        """Add its gradients to those of the supernet's parameters; inactive ones get none."""
        raise NotImplementedError


class _Sliced(Subnet):
    """Runs with the leading entries of the weights, as leaves of their own.

    Leaves, because a slice that autograd follows would write a zero-padded gradient of the
    whole weight in every pass.
    """

    def __init__(self, supernet: Supernet, channels: Mapping[str, int]) -> None:
        self._supernet, self._channels = supernet, channels
        self._extents = supernet.extents(channels)
        self._leaves = {
            name: tensor.requires_grad_(torch.is_grad_enabled())
            for name, tensor in supernet.slice_weights(self._extents).items()
        }

    def __call__(self, images: Tensor) -> Tensor:
        supernet = self._supernet
        supernet._draw_nothing()  # noqa: SLF001 (the two are one thing)
        with (
            supernet.resize_forward(self._channels, self._extents),
            supernet.replace_parameters(self._leaves),
        ):
            logits: Tensor = supernet.model(images)
        return logits

    def collect(self) -> None:
        gradients = {
            name: leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None
        }
        self._supernet.gather(gradients, self._extents)


class _Masked(Subnet):
    """Runs all channels, those that are off at a scale and shift of 0."""

    def __init__(self, supernet: Supernet, channels: Mapping[str, int]) -> None:
        self._supernet = supernet
        free = supernet.graph.free
        on = [
            torch.arange(free[name].classes) < channels[name] // free[name].unit
            for name in supernet.graph.searchable
        ]
        self._factors = torch.cat(on).to(supernet.device, torch.float32)

    def __call__(self, images: Tensor) -> Tensor:
        supernet = self._supernet
        supernet._draw_nothing()  # noqa: SLF001 (the two are one thing)
        with supernet.replace_parameters(supernet.fold_batchnorm(self._factors, learn=True)):
            logits: Tensor = supernet.model(images)
        return logits

    def collect(self) -> None:
        """They are there already."""


def check_maskable(supernet: Supernet, images: Tensor, channels: Mapping[str, int]) -> None:
    """Raise unless a mask computes what the slice does.

    It does wherever all that mixes channels is a convolution or linear layer, and an activation
    of 0 is 0; what else a network does cannot be read from its graph, so it is tried.

    Raises:
        InputError: It does not.
    """
    with torch.no_grad():
        sliced, masked = (
            supernet.subnet(channels, backend=backend)(images).double()
            for backend in ("slice", "mask")
        )
    gap = float((sliced - masked).abs().max() / sliced.abs().max().clamp_min(1e-12))
    if not gap <= _AGREEMENT:
        raise InputError(
            f"network computes something else once BatchNorm switches channels off (logits differ "
            f"by {gap:.2g} of their size), but that is how it would be searched; let channels pass "
            "a BatchNorm and an activation that is 0 at 0 before they are mixed"
        )


_LAST_CHANNELS = 256
"""Channels up to which a convolution is faster in channels-last order on a CPU.

Pointwise and depthwise ones always are; larger dense ones are faster in the other order, and
odd channel counts, as subnets have, widen both differences (measured with oneDNN on AVX-512).
"""

_AGREEMENT = 0.02
"""Relative difference of logits between mask and slice that rounding can explain."""


def _extent(axis: Axis, counts: Mapping[int, int]) -> Extent:
    kept: list[range] = []
    position = 0
    for run in axis:
        last = counts.get(run.variable, run.start + run.classes)
        classes = min(max(last - run.start, 0), run.classes)
        if classes:
            kept.append(range(position, position + classes * run.repeat))
        position += run.classes * run.repeat
    if kept[0].start == 0 and all(one.stop == other.start for one, other in pairwise(kept)):
        return kept[-1].stop
    return torch.tensor([entry for one in kept for entry in one])


def _length(extent: Extent) -> int:
    return extent if isinstance(extent, int) else len(extent)


def _select_entries(
    tensor: Tensor, axes: Iterable[tuple[int, Axis]], extents: Mapping[Axis, Extent]
) -> Tensor:
    """The entries of a tensor that stay."""
    for dim, axis in axes:
        extent = extents[axis]
        if isinstance(extent, int):
            tensor = tensor.narrow(dim, 0, extent)
        else:
            tensor = tensor.index_select(dim, extent.to(tensor.device))
    return tensor


def _scatter(tensor: Tensor, kept: Mapping[int, Extent], addition: Tensor) -> None:
    """Add to the entries of a tensor that stay."""
    places: list[Tensor] = []
    for dim in range(tensor.dim()):
        extent = kept.get(dim, tensor.shape[dim])
        index = torch.arange(extent) if isinstance(extent, int) else extent
        shape: Sequence[int] = [-1 if other == dim else 1 for other in range(tensor.dim())]
        places.append(index.to(tensor.device).view(shape))
    tensor.index_put_(tuple(places), addition, accumulate=True)
