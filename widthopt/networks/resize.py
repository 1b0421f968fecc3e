"""The same network at other channel counts, and a setting made into a network."""

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
    """A setting's network before it has weights: what to size, and how to build it.

    Attributes:
        setting: The setting.
        graph: The un-optimised network at the setting's width and resolution.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        # A network with a table among its values, as one of the user's own, is not remembered.
        traced: Any = _traced if _hashable(setting.network) else _traced.__wrapped__
        axes = (setting.network, setting.depth, setting.classes, setting.resolution)
        self._traced: WidthGraph = traced(*axes)
        self.graph = self._traced.resize_graph(scale_channels(self._traced, setting.width))

    def build(self, channels: Mapping[str, int], *, seed: int) -> nn.Module:
        """The network at these channel counts with fresh weights that depend on the seed."""
        setting = self.setting
        # Not kept: a sweep has hundreds of settings, and each network its weights.
        model = _build(setting.network, setting.depth, setting.classes)
        return resize(model, self._traced, channels, seed=seed, rules=setting.network.rules)

    def resize_graph(self, channels: Mapping[str, int]) -> WidthGraph:
        """The graph of the network at these channel counts, which `build` makes."""
        return self._traced.resize_graph(channels)

    def parameters(self, channels: Mapping[str, int]) -> int:
        """How many parameters the network has at these channel counts."""
        network = self.setting.network
        shapes: Any = _shapes if _hashable(network) else _shapes.__wrapped__
        model = on_meta(shapes(network, self.setting.depth, self.setting.classes))
        _Resizer(self._traced, channels, {}).resize(model)
        return sum(parameter.numel() for parameter in model.parameters())


@lru_cache(maxsize=64)
def _traced(network: Network, depth: int, classes: int, resolution: int) -> WidthGraph:
    """The graph of a network at width multiplier 1.

    Remembered, since a plan asks for those of few networks some hundred times.
    """
    model = _build(network, depth, classes)
    stages = network.stages(model)
    return trace(model, resolution, stages=stages, rules=network.rules)


@lru_cache(maxsize=64)
def _shapes(network: Network, depth: int, classes: int) -> nn.Module:
    """The network at width multiplier 1 without weights; remembered as its graph is."""
    return on_meta(_build(network, depth, classes))


def _hashable(network: Network) -> bool:
    try:
        hash(network)
    except TypeError:
        return False
    return True


def _build(network: Network, depth: int, classes: int) -> nn.Module:
    """The network as it comes; the caller's random numbers stay as they were."""
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
    """The same network at other channel counts; the given one is left as it is.

    Where the forward code has channel counts written into it (a split, a channel shuffle),
    the result is a ``torch.fx.GraphModule`` with the same parameter names.

    Args:
        model: The network that was traced.
        graph: Its graph, as `widthopt.trace` returned it.
        channels: Count of each free width variable, from 1 up.
        weights: ``fresh``: as torchvision starts them (see `widthopt.networks.initialise`).
            ``slice_weights``: those of the given model, for counts no larger than its own.
        keep: For ``slice_weights``, the classes that stay, ascending, by variable; without it the
            leading ones do. A class is one channel, or a group of a grouped convolution.
        seed: What fresh weights depend on.
        rules: The tracing rules that were given to `widthopt.trace`.

    Raises:
        InputError: The counts do not fit the graph, or ask for more than there is to slice.
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
        leading = {n: range(channels[n] // one.unit) for n, one in graph.free.items()}
        keep = {**leading, **(keep or {})}
        resized = copy.deepcopy(model)
        _Resizer(graph, channels, keep).resize(resized)
    if not graph.rewrites:
        return resized
    return _rewritten(resized, graph.resize_graph(channels, keep=keep), rules)


class _Resizer:
    """Indexes every tensor with a channel axis by the entries that it has afterwards."""

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
        """Give every layer of the model its new size, in place."""
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
        """Fill what no layer resets, such as a layer scale, from the given model."""
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
    """The dimensions of every parameter and buffer that are channel axes, by name.

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
    """Set the counts that a convolution or linear layer keeps."""
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = reads, writes
        return
    assert isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001 (their shared base class)
    group = module.in_channels // module.groups
    module.in_channels, module.out_channels = reads, writes
    if kind != "dense":
        module.groups = reads // group


def _set_size(module: nn.Module, size: int) -> None:
    """The attributes in which a layer keeps its number of channels."""
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, name):
            setattr(module, name, size)
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (size,)


def _select(module: nn.Module, name: str, dims: Mapping[int, Tensor]) -> None:
    """Replace a parameter or buffer by its entries at these places."""
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


def _rewritten(
    model: nn.Module, graph: WidthGraph, rules: Mapping[Any, Any] | None
) -> fx.GraphModule:
    """The network with its splits, shuffles and literal sizes written for the new counts."""
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
        nodes[rewrite.node] = new  # what reads this node next reads its replacement
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def selection_name(number: int) -> str:
    """The buffer that says what a rewritten ``select`` takes; see `WidthGraph.rewrites`."""
    return f"channel_selection_{number}"


def selected_entries(rewrite: Rewrite) -> list[int]:
    """The entries of the source, block by block as they were picked."""
    blocks: list[range] = []
    position = 0
    for run in rewrite.reads:
        for _ in range(run.classes):
            blocks.append(range(position, position + run.repeat))
            position += run.repeat
    return [entry for pick in rewrite.picks for entry in blocks[pick]]
