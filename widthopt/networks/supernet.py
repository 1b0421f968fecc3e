"""A traced network that runs at any channel counts up to its own.

A *supernet* is the network with its searchable width variables enlarged. A *subnet* is the
same network at fewer channels, with the leading channels of the supernet's weights. A subnet runs
with one of two backends that compute the same result. ``slice`` uses only those entries of the
weights. ``mask`` runs all channels and multiplies BatchNorm's scale and shift by 0 where a channel
is off, which equals BatchNorm's output times 0. The same fold takes real factors, for a mixture
of widths.

Every forward pass normalises with the statistics of its own batch. Running statistics over
passes of different widths would fit none of them, so the supernet keeps none. A pass draws no
random numbers (dropout is off), so that both backends agree.

Source: Yu and Huang, 2019, "Universally Slimmable Networks"; Guo et al., 2020, "DMCP";
docs/algorithms/autoslim.md, 1.3 and 1.4; docs/algorithms/dmcp.md, 1.4 and 4.2.
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
"""Where the factors of a mixture apply: after BatchNorm, or after the activation behind it."""

Extent = int | Tensor
"""The entries that an axis keeps: the length of a leading part, or an index tensor."""


class _Slot(NamedTuple):
    """A parameter, where the module stores it, and which of its dimensions are channel axes."""

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
    """Return the channels of a network whose searchable variables are a factor wider.

    Interpretation: a variable without a BatchNorm (a squeeze layer, for example) cannot be
    searched. It is not enlarged and keeps a multiplier of 1.

    Source: paper appendix A, "We enlarge the network by 1.5x".
    """
    searchable = set(graph.searchable)
    return {
        name: var.unit * round(factor * var.classes) if name in searchable else var.channels
        for name, var in graph.free.items()
    }


class Supernet:
    """The enlarged network of a setting, with its weights.

    Attributes:
        model: The network at its full width. Its forward pass is that of the widest subnet.
        graph: Its graph: the searchable variables are enlarged, the fixed ones are not.
        base: The graph of the network N before it is enlarged, which multipliers refer to.
        backend: How subnets run.
        mixed: Whether every convolution gets its input in the memory format that is fastest for
            it on a CPU, rather than in that of the images.
    """

    def __init__(
        self, blueprint: Blueprint, *, enlarge: float, seed: int, backend: Backend = "slice"
    ) -> None:
        """Build the network with fresh weights.

        Args:
            blueprint: The network.
            enlarge: Factor on the channels of its searchable variables, at least 1.
            seed: Seed of the weights.
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
                module.register_forward_pre_hook(self._lay_out)
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
        self._norms = tuple(self.graph.scale_axes)
        self._places = torch.tensor(list(self._class_numbers()))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def full(self, images: Tensor) -> Tensor:
        """Return the logits of the widest subnet, ``batch classes``; parameters get gradients."""
        self._disable_dropout()
        logits: Tensor = self.model(images)
        return logits

    def subnet(self, channels: Mapping[str, int], *, backend: Backend | None = None) -> "Subnet":
        """Return the subnet at these channel counts, for one forward and backward pass.

        Args:
            channels: Count of each free width variable, at most the supernet's.
            backend: How it runs; the supernet's backend if None.
        """
        masked = (backend or self.backend) == "mask"
        return _Masked(self, channels) if masked else _Sliced(self, channels)

    def mixture(self, images: Tensor, factors: Tensor, *, site: ScaleSite = "norm") -> Tensor:
        """Return the logits of the full supernet with every channel times a factor.

        A factor applies after every BatchNorm that its channel passes. Only the factors get
        gradients; those of the weights are not computed.

        Args:
            images: ``batch 3 height width``.
            factors: One factor for each class of the searchable variables, in the order of
                `WidthGraph.searchable`; at most 1 if they apply after activations.
            site: Whether they apply before or after the activation. The two differ only for
                ReLU6, which clips its input. It has to be a module that reads a BatchNorm.

        Returns:
            Logits, ``batch classes``.

        Source: Guo et al., 2020, "DMCP", section 3.2; docs/algorithms/dmcp.md, 1.4 and D7.
        """
        weights = {name: slot.parameter.detach() for name, slot in self._slots.items()}
        self._disable_dropout()
        with (
            self.replace_parameters({**weights, **self.fold_batchnorm(factors, learn=False)}),
            self._clipping(factors if site == "activation" else None),
        ):
            logits: Tensor = self.model(images)
        return logits

    def fold_batchnorm(self, factors: Tensor, *, learn: bool) -> dict[str, Tensor]:
        """Return BatchNorm's scales and shifts times the factors of their channels, by name.

        Args:
            factors: As for `mixture`.
            learn: Whether the scales and shifts get gradients too.
        """
        # All norms together: one product instead of two for every layer.
        spread = self._spread(factors)
        tensors: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in self._norms]
            own: list[Tensor] = [self._slots[name].parameter for name in names]
            flat = torch.cat(own) if learn else torch.cat(own).detach()
            sizes = [parameter.numel() for parameter in own]
            tensors |= zip(names, (flat * spread.to(flat.dtype)).split(sizes), strict=True)
        return tensors

    def _spread(self, factors: Tensor) -> Tensor:
        """Return the factor of every entry of every BatchNorm scale, norm by norm."""
        self._places = self._places.to(factors.device)
        return torch.cat([factors, factors.new_ones(1)])[self._places]

    @contextmanager
    def _clipping(self, factors: Tensor | None) -> Iterator[None]:
        """Let a ReLU6 after a BatchNorm clip at 6 times the factor of each channel.

        Then ``min(relu(s z), 6 s) = s relu6(z)``: the factors apply after the activation, although
        they are folded into BatchNorm.

        Args:
            factors: As for `mixture`; None leaves ReLU6 unchanged.
        """
        if factors is None:
            yield
            return
        sizes = [self._slots[f"{name}.weight"].parameter.numel() for name in self._norms]
        limits = (6 * self._spread(factors)).split(sizes)
        normalised: list[tuple[Tensor, Tensor]] = []  # the last output of a BatchNorm

        def note(limit: Tensor, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            normalised[:] = [(output, limit.view(-1, *[1] * (output.dim() - 2)))]

        def clip(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            matching = [limit for tensor, limit in normalised if tensor is inputs[0]]
            return torch.minimum(output, matching[0].to(output.dtype)) if matching else output

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
        """Return the entries of every channel axis at these counts: the leading classes."""
        counts = {
            index: channels[variable.name] // variable.unit
            for index, variable in enumerate(self.graph.variables)
            if variable.free
        }
        axes = {axis for slot in self._slots.values() for _, axis in slot.axes}
        axes |= {layer.reads for layer in self._grouped} | {axis for _, axis in self._layer_norms}
        return {axis: _extent(axis, counts) for axis in axes}

    def slice_weights(self, extents: Mapping[Axis, Extent]) -> dict[str, Tensor]:
        """Return the weights of a subnet by name, detached; views of the supernet's if possible.

        They have the shapes of the parameters of `Blueprint.build` at these counts.
        """
        return {
            name: _select_entries(slot.parameter.detach(), slot.axes, extents)
            for name, slot in self._slots.items()
        }

    @contextmanager
    def replace_parameters(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the network compute with these tensors instead of its parameters.

        Like ``torch.func.functional_call``, but without a walk over all modules in every pass.
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
        """Let the forward code be that of a subnet: its groups and its selections of channels."""
        values: list[tuple[nn.Module, str, object]] = [
            (layer.module, "groups", _length(extents[layer.reads]) // layer.per_group)
            for layer in self._grouped
        ]
        values += [
            (module, "normalized_shape", (_length(extents[axis]),))
            for module, axis in self._layer_norms
        ]
        if any(rewrite.kind == "select" for rewrite in self.graph.rewrites):
            leading = {n: range(channels[n] // var.unit) for n, var in self.graph.free.items()}
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
        """Add the gradients of a slice's weights to those of the supernet's parameters."""
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

    def _lay_out(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Convert the input of a convolution to its own memory format, if formats are mixed."""
        if not self.mixed:
            return None
        weight = module.weight
        assert isinstance(weight, Tensor)
        channels = max(weight.shape[0], weight.shape[1])
        last = channels <= _LAST_CHANNELS or weight.shape[2:].numel() == 1 or weight.shape[1] == 1
        last = last and not wrong_in_channels_last(module)
        layout = torch.channels_last if last else torch.contiguous_format
        return tuple(tensor.contiguous(memory_format=layout) for tensor in inputs)

    def _disable_dropout(self) -> None:
        """Switch to evaluation mode. BatchNorm still uses batch statistics: it keeps no others."""
        if self.model.training:
            self.model.eval()

    def _class_numbers(self) -> Iterator[int]:
        """Yield the number of its class for every entry of every BatchNorm scale.

        The classes of all searchable variables are numbered consecutively. The next number
        stands for all fixed channels.
        """
        starts: dict[int, int] = {}
        total = 0
        index = {var.name: place for place, var in enumerate(self.graph.variables)}
        for name in self.graph.searchable:
            starts[index[name]] = total
            total += self.graph.free[name].classes
        for axis in self.graph.scale_axes.values():
            for span in axis:
                start = starts.get(span.variable)
                for number in range(span.start, span.start + span.classes):
                    yield from [total if start is None else start + number] * span.repeat


class Subnet:
    """A subnet for one pass: call it, call ``backward``, then `collect` its gradients."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits, ``batch classes``."""
        raise NotImplementedError

    def collect(self) -> None:
        """Add its gradients to those of the supernet's parameters; inactive entries get none."""
        raise NotImplementedError


class _Sliced(Subnet):
    """Runs with the leading entries of the weights, as separate leaf tensors.

    Leaf tensors, because autograd would write a zero-padded gradient of the full weight for every
    slice in every pass.
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
        supernet._disable_dropout()  # noqa: SLF001 (a subnet is a part of the supernet)
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
    """Runs all channels, with a scale and shift of 0 for those that are off."""

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
        supernet._disable_dropout()  # noqa: SLF001 (a subnet is a part of the supernet)
        with supernet.replace_parameters(supernet.fold_batchnorm(self._factors, learn=True)):
            logits: Tensor = supernet.model(images)
        return logits

    def collect(self) -> None:
        """Do nothing: autograd has added the gradients to the parameters."""


def check_maskable(supernet: Supernet, images: Tensor, channels: Mapping[str, int]) -> None:
    """Raise an error unless a masked subnet computes what the sliced one does.

    It does if only convolutions and linear layers mix channels and every activation maps 0 to 0.
    The graph does not tell what else a network computes, so both backends run once.

    Raises:
        InputError: The logits differ by more than rounding explains.
    """
    with torch.no_grad():
        sliced, masked = (
            supernet.subnet(channels, backend=backend)(images).double()
            for backend in ("slice", "mask")
        )
    gap = float((sliced - masked).abs().max() / sliced.abs().max().clamp_min(1e-12))
    if not gap <= _AGREEMENT:
        raise InputError(
            f"network gives different logits when BatchNorm switches channels off (relative "
            f"difference {gap:.2g}), but the search switches channels off this way; let channels "
            "pass a BatchNorm and an activation that maps 0 to 0 before they are mixed"
        )


_LAST_CHANNELS = 256
"""Channels up to which a dense convolution is faster in channels-last format on a CPU.

Pointwise and depthwise convolutions always are. Larger dense ones are faster in contiguous format.
Odd channel counts, as subnets have, widen both differences (measured with oneDNN on AVX-512).
"""

_AGREEMENT = 0.02
"""Relative difference between the logits of mask and slice that rounding can explain."""


def _extent(axis: Axis, counts: Mapping[int, int]) -> Extent:
    kept: list[range] = []
    position = 0
    for span in axis:
        last = counts.get(span.variable, span.start + span.classes)
        classes = min(max(last - span.start, 0), span.classes)
        if classes:
            kept.append(range(position, position + classes * span.repeat))
        position += span.classes * span.repeat
    if kept[0].start == 0 and all(left.stop == right.start for left, right in pairwise(kept)):
        return kept[-1].stop
    return torch.tensor([entry for entries in kept for entry in entries])


def _length(extent: Extent) -> int:
    return extent if isinstance(extent, int) else len(extent)


def _select_entries(
    tensor: Tensor, axes: Iterable[tuple[int, Axis]], extents: Mapping[Axis, Extent]
) -> Tensor:
    """Return the kept entries of a tensor."""
    for dim, axis in axes:
        extent = extents[axis]
        if isinstance(extent, int):
            tensor = tensor.narrow(dim, 0, extent)
        else:
            tensor = tensor.index_select(dim, extent.to(tensor.device))
    return tensor


def _scatter(tensor: Tensor, kept: Mapping[int, Extent], addition: Tensor) -> None:
    """Add to the kept entries of a tensor, in place."""
    places: list[Tensor] = []
    for dim in range(tensor.dim()):
        extent = kept.get(dim, tensor.shape[dim])
        index = torch.arange(extent) if isinstance(extent, int) else extent
        shape: Sequence[int] = [-1 if axis == dim else 1 for axis in range(tensor.dim())]
        places.append(index.to(tensor.device).view(shape))
    tensor.index_put_(tuple(places), addition, accumulate=True)
