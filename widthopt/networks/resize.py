"""Resize a network to new channel counts, and build the network of a setting."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from widthopt.errors import InputError
from widthopt.networks import initialise
from widthopt.setting import Network, Setting
from widthopt.tracing import on_meta, symbolic_trace, trace
from widthopt.widthgraph import Axis, Rewrite, WidthGraph
from widthopt.widths import scale_channels


class Blueprint:
    """A setting's network without weights: its graph, and how to build it at given channels.

    Attributes:
        setting: The setting.
        graph: The baseline network (uniform widths) at the setting's width and resolution.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        # A network that is not hashable, such as a custom one with a mapping, is not cached.
        traced: Any = _trace_network if _hashable(setting.network) else _trace_network.__wrapped__
        axes = (setting.network, setting.depth, setting.classes, setting.resolution)
        self._graph: WidthGraph = traced(*axes)
        self.graph: WidthGraph = self._graph.resize_graph(
            scale_channels(self._graph, setting.width)
        )

    def build(self, channels: Mapping[str, int], *, seed: int) -> nn.Module:
        """Build the network at these channel counts with fresh weights that depend on the seed."""
        setting = self.setting
        # Not cached: a sweep has hundreds of settings, and each network holds its weights.
        model = _build(setting.network, setting.depth, setting.classes)
        return resize(model, self._graph, channels, seed=seed, rules=setting.network.rules)

    def resize_graph(self, channels: Mapping[str, int]) -> WidthGraph:
        """Return the graph of the network that `build` makes at these channel counts."""
        return self._graph.resize_graph(channels)

    def shapes(self) -> nn.Module:
        """Return the network at width multiplier 1 without weights; it must not be changed."""
        network = self.setting.network
        build: Any = _shapes if _hashable(network) else _shapes.__wrapped__
        model: nn.Module = build(network, self.setting.depth, self.setting.classes)
        return model

    def parameters(self, channels: Mapping[str, int]) -> int:
        """Return the number of parameters of the network at these channel counts."""
        model = on_meta(self.shapes())
        _Resizer(self._graph, channels, {}).resize(model)
        return sum(parameter.numel() for parameter in model.parameters())


@lru_cache(maxsize=64)
def _trace_network(network: Network, depth: int, classes: int, resolution: int) -> WidthGraph:
    """Return the graph of a network at width multiplier 1.

    Cached, since a plan needs the graphs of a few networks some hundred times.
    """
    model = _build(network, depth, classes)
    stages = network.stages(model)
    return trace(model, resolution, stages=stages, rules=network.rules)


@lru_cache(maxsize=64)
def _shapes(network: Network, depth: int, classes: int) -> nn.Module:
    """Return the network at width multiplier 1 without weights; cached like its graph."""
    return on_meta(_build(network, depth, classes))


def _hashable(network: Network) -> bool:
    try:
        hash(network)
    except TypeError:
        return False
    return True


def _build(network: Network, depth: int, classes: int) -> nn.Module:
    """Build the network at width multiplier 1; the global rng state is preserved."""
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = network.build(depth=depth, classes=classes)
    return model


def resize(
    model: nn.Module,
    graph: WidthGraph,
    channels: Mapping[str, int],
    *,
    weights: Literal["fresh", "sliced"] = "fresh",
    keep: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    rules: Mapping[Any, Any] | None = None,
) -> nn.Module:
    """Return a copy of a network at new channel counts; the given network is not changed.

    If the forward code contains channel counts (a split, a channel shuffle), the result is a
    ``torch.fx.GraphModule`` with the same parameter names.

    Args:
        model: The network that was traced.
        graph: Its graph, as returned by `widthopt.trace`.
        channels: Count of each free width variable, at least 1.
        weights: ``fresh``: initialised as torchvision does (see `widthopt.networks.initialise`).
            ``sliced``: taken from the given model, for counts no larger than its own.
        keep: For ``sliced``, the classes to keep, ascending, by variable; by default the leading
            ones. A class is one channel, or a group of a grouped convolution.
        seed: Seed of fresh weights.
        rules: The tracing rules that were passed to `widthopt.trace`.

    Raises:
        InputError: The counts do not fit the graph, or exceed those of the model to slice.
    """
    graph.check(channels)
    if weights == "fresh":
        resized = on_meta(model)
        resizer = _Resizer(graph, channels, keep)
        resizer.resize(resized)
        resized.to_empty(device="cpu")
        resizer.copy_unowned(model, resized)
        initialise(resized, seed=seed)
    else:
        for name, variable in graph.free.items():
            if channels[name] > variable.channels:
                raise InputError(
                    f"channels.{name} is {channels[name]}, but the given network has "
                    f"{variable.channels} to slice from; ask for fewer, or for fresh weights"
                )
        leading = {n: range(channels[n] // var.unit) for n, var in graph.free.items()}
        keep = {**leading, **(keep or {})}
        resized = copy.deepcopy(model)
        _Resizer(graph, channels, keep).resize(resized)
    if not graph.rewrites:
        return resized
    return _rewrite_forward(resized, graph.resize_graph(channels, keep=keep), rules)


class _Resizer:
    """Indexes every tensor with a channel axis by the entries to keep."""

    def __init__(
        self,
        graph: WidthGraph,
        channels: Mapping[str, int],
        keep: Mapping[str, Sequence[int]] | None,
    ) -> None:
        self._graph = graph
        self._origins = graph.origins(channels, keep)

    def _index(self, axis: Axis) -> Tensor:
        return torch.tensor(self._graph.entries(axis, self._origins))

    def resize(self, model: nn.Module) -> None:
        """Resize every layer of the model in place."""
        for name, dims in tensor_axes(model, self._graph).items():
            owner, _, attribute = name.rpartition(".")
            index = {dim: self._index(axis) for dim, axis in dims.items()}
            _select(model.get_submodule(owner), attribute, index)
        layers = {layer.name: layer for layer in self._graph.layers}  # a shared one counts once
        for layer in layers.values():
            reads, writes = len(self._index(layer.reads)), len(self._index(layer.writes))
            _size_layer(model.get_submodule(layer.name), layer.kind, reads, writes)
        for norm in self._graph.norms:
            _set_size(model.get_submodule(norm.name), len(self._index(norm.axis)))
        for parameter in self._graph.parameters:
            owner = parameter.name.rpartition(".")[0]
            _set_size(model.get_submodule(owner), len(self._index(parameter.axis)))

    def copy_unowned(self, model: nn.Module, resized: nn.Module) -> None:
        """Copy tensors that no layer resets, such as a layer scale, from the given model."""
        dims: dict[str, dict[int, Tensor]] = {}
        for parameter in self._graph.parameters:
            dims.setdefault(parameter.name, {})[parameter.dim] = self._index(parameter.axis)
        resets = {
            name for name, module in model.named_modules() if hasattr(module, "reset_parameters")
        } - {""}
        given = itertools.chain(model.named_parameters(), model.named_buffers())
        values = dict(itertools.chain(resized.named_parameters(), resized.named_buffers()))
        for name, value in given:
            if name.rpartition(".")[0] in resets:
                continue
            taken = value.detach()
            for dim, index in dims.get(name, {}).items():
                taken = taken.index_select(dim, index.to(taken.device))
            values[name].detach().copy_(taken)


def tensor_axes(model: nn.Module, graph: WidthGraph) -> dict[str, dict[int, Axis]]:
    """Return the dimensions of every parameter and buffer that are channel axes, by name.

    Args:
        model: The network that ``graph`` describes.
        graph: Its graph.
    """
    axes: dict[str, dict[int, Axis]] = {}
    for layer in graph.layers:
        transposed = getattr(model.get_submodule(layer.name), "transposed", False)
        first, second = (layer.reads, layer.writes) if transposed else (layer.writes, layer.reads)
        # One group of a depthwise or grouped convolution reads a constant number of channels.
        weight = {0: first, 1: second} if layer.kind == "dense" else {0: first}
        axes |= {f"{layer.name}.weight": weight, f"{layer.name}.bias": {0: layer.writes}}
    for norm in graph.norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            axes[f"{norm.name}.{name}"] = {0: norm.axis}
    for parameter in graph.parameters:
        axes.setdefault(parameter.name, {})[parameter.dim] = parameter.axis
    values = (model.named_parameters, model.named_buffers)
    named = {name for get in values for name, _ in get(remove_duplicate=False)}
    return {name: dims for name, dims in axes.items() if name in named}


def _size_layer(module: nn.Module, kind: str, reads: int, writes: int) -> None:
    """Set the channel counts that a convolution or linear layer stores."""
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = reads, writes
        return
    assert isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001 (the shared base class)
    group = module.in_channels // module.groups
    module.in_channels, module.out_channels = reads, writes
    if kind != "dense":
        module.groups = reads // group


def _set_size(module: nn.Module, size: int) -> None:
    """Set the attributes in which a layer stores its number of channels."""
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, name):
            setattr(module, name, size)
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (size,)


def _select(module: nn.Module, name: str, dims: Mapping[int, Tensor]) -> None:
    """Replace a parameter or buffer by its entries at these indices."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return
    taken = value.detach()
    for dim, index in dims.items():
        taken = taken.index_select(dim, index.to(taken.device))
    if isinstance(value, nn.Parameter):
        setattr(module, name, nn.Parameter(taken, requires_grad=value.requires_grad))
    else:
        setattr(module, name, taken)


def _rewrite_forward(
    model: nn.Module, graph: WidthGraph, rules: Mapping[Any, Any] | None
) -> fx.GraphModule:
    """Rewrite the splits, shuffles and literal sizes of a network for the new counts."""
    module = symbolic_trace(model, rules)
    nodes = {node.name: node for node in module.graph.nodes}
    for number, rewrite in enumerate(graph.rewrites):
        node, source = nodes[rewrite.node], nodes[rewrite.source]
        with module.graph.inserting_after(node):
            if rewrite.kind == "flatten":
                new = module.graph.call_function(torch.flatten, (source, rewrite.dim))
            else:
                name = selection_name(number)
                places = torch.tensor(selected_entries(rewrite))
                module.register_buffer(name, places, persistent=False)
                with module.graph.inserting_before(node):
                    index = module.graph.get_attr(name)
                new = module.graph.call_function(torch.index_select, (source, rewrite.dim, index))
        node.replace_all_uses_with(new)
        nodes[rewrite.node] = new  # later rewrites use the replacement
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def selection_name(number: int) -> str:
    """Return the name of the index buffer of a ``select``; see `WidthGraph.rewrites`."""
    return f"channel_selection_{number}"


def selected_entries(rewrite: Rewrite) -> list[int]:
    """Return the selected entries of the source, block by block in the order of the picks."""
    blocks: list[range] = []
    position = 0
    for span in rewrite.reads:
        for _ in range(span.classes):
            blocks.append(range(position, position + span.repeat))
            position += span.repeat
    return [entry for pick in rewrite.picks for entry in blocks[pick]]
