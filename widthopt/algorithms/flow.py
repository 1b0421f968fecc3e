"""Data flow of a traced network: the nodes to run again when a width variable loses channels.

A *reader* of a width variable is a dense layer, a convolution or linear layer that mixes its input
channels, with the variable as an input. Before the readers each channel is computed independently.
"""

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widthopt.networks.supernet import Supernet
from widthopt.tracing.labels import torch_function_name
from widthopt.widthgraph import Layer, WidthGraph


_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd)  # noqa: SLF001 (their base)

_SHARING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd,  # noqa: SLF001 (their base)
)  # fmt: skip

_PER_CHANNEL_MODULES: tuple[type[nn.Module], ...] = (
    *_SHARING_MODULES, _BatchNorm,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.LogSigmoid, nn.PReLU,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample,
)  # fmt: skip

_IN_PLACE = "iadd isub imul itruediv"

_ACTIVATIONS = (
    "relu relu6 leaky_relu elu selu celu silu mish hardtanh hardswish hardsigmoid threshold"
)
"""Functions that can be told by position to compute in place."""

_NEW = (
    "relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign sigmoid tanh hardtanh "
    "hardswish hardsigmoid logsigmoid threshold clamp neg abs exp log sqrt rsqrt square add radd "
    "sub rsub mul rmul div truediv multiply divide maximum minimum pow cat concat concatenate "
    "index_select avg_pool1d avg_pool2d max_pool1d max_pool2d adaptive_avg_pool1d clone "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d interpolate"
)

_SHARING = (
    "relu_ leaky_relu_ elu_ sigmoid_ tanh_ hardtanh_ clamp_ add_ sub_ mul_ div_ flatten view "
    "reshape getitem contiguous detach to dropout dropout1d dropout2d dropout3d stochastic_depth"
)

_NEW_FUNCTIONS = frozenset([*_NEW.split(), "mean", "sum", "amax", "amin"])
"""Their values share no memory with their inputs."""

_PER_CHANNEL_FUNCTIONS = frozenset(f"{_NEW} {_SHARING} {_IN_PLACE}".split())
"""Not among them: what normalises over channels, and what moves the channels to another axis."""


class Flow:
    """What depends on what in a traced network.

    Attributes:
        images: The node of the images.
        result: The node of the logits.
        layers: The layer call that a node is.
        readers: By variable, the dense layers that read it.
        changed: By variable, the nodes that depend on its bin: its readers and what follows.
        inputs: By variable, the other nodes that those read.
        stale: By variable, the nodes that have its channels, and what follows.
        mixed: Variables whose channels something other than a dense layer may mix, or whose
            values cannot be kept: their candidates are not to be run from the base.
        overwritten: By node that computes in place, the earlier nodes that share its memory.
    """

    def __init__(
        self, supernet: Supernet, traced: fx.GraphModule, rules: Mapping[Any, Any]
    ) -> None:
        self._model = supernet.model
        self._modules = dict(supernet.model.named_modules())
        self._rules = rules
        nodes = list(traced.graph.nodes)
        output = nodes.pop()
        (result,) = output.args
        self.result: fx.Node = result
        self.images: fx.Node = next(node for node in nodes if node.op == "placeholder")
        self._order = {node: place for place, node in enumerate(nodes)}
        graph = supernet.graph
        self.layers = self._layers(nodes, graph)
        self.overwritten, entangled = self._find_overwritten(nodes)
        names = {
            index: variable.name for index, variable in enumerate(graph.variables) if variable.free
        }
        carried = self._carry_variables(nodes, names)
        self.mixed = set(graph.free) if entangled else set()
        for node in nodes:
            if carried[node] and not self._per_channel(node):
                self.mixed |= carried[node]
        self.readers: dict[str, list[Layer]] = {}
        self.changed: dict[str, set[fx.Node]] = {}
        self.inputs: dict[str, set[fx.Node]] = {}
        self.stale: dict[str, set[fx.Node]] = {}
        for index, name in names.items():
            reading = {
                node: layer
                for node, layer in self.layers.items()
                if layer.kind == "dense" and any(run.variable == index for run in layer.reads)
            }
            self.readers[name] = list(reading.values())
            self.changed[name] = changed = followers(nodes, reading)
            self.inputs[name] = {
                source
                for node in changed
                for source in node.all_input_nodes
                if source not in changed and source.op != "get_attr"
            }
            self.stale[name] = followers(nodes, {node for node in nodes if name in carried[node]})

    def nodes_to_run(
        self,
        wanted: Iterable[fx.Node],
        given: Mapping[fx.Node, Any],
        changed: AbstractSet[fx.Node] = frozenset(),
    ) -> list[fx.Node]:
        """Return the nodes to run, in order, to compute the wanted values.

        Args:
            wanted: Nodes whose values are needed.
            given: Available values.
            changed: Nodes to run even if their values are available.
        """
        todo: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in todo and (node in changed or node not in given):
                todo.add(node)
                stack += node.all_input_nodes
        return sorted(todo, key=self._order.__getitem__)

    def call(self, node: fx.Node, operands: Mapping[fx.Node, Any]) -> Any:
        """Compute the value of a node from its operands."""
        args: Any = fx.node.map_arg(node.args, operands.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, operands.__getitem__)
        target: Any = node.target
        if node.op == "call_module":
            return self._modules[target](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(target)(self._model)
        return target(*args, **kwargs)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _layers(self, nodes: Iterable[fx.Node], graph: WidthGraph) -> dict[fx.Node, Layer]:
        """Return the layer of each node; the graph lists the calls in the order of the nodes."""
        calls: dict[str, list[Layer]] = defaultdict(list)
        for layer in graph.layers:
            calls[layer.name].append(layer)
        number: Counter[str] = Counter()
        layers: dict[fx.Node, Layer] = {}
        for node in nodes:
            name = str(node.target)
            if node.op == "call_module" and name in calls:
                layers[node] = calls[name][number[name]]
                number[name] += 1
        assert len(layers) == len(graph.layers), "the trace is that of another network"
        return layers

    def _carry_variables(
        self, nodes: Iterable[fx.Node], names: Mapping[int, str]
    ) -> dict[fx.Node, set[str]]:
        """Return, for each node, the variables whose channels its value may have."""
        carried: dict[fx.Node, set[str]] = {}
        for node in nodes:
            if node in self.layers:
                writes = self.layers[node].writes
                carried[node] = {names[run.variable] for run in writes if run.variable in names}
            else:
                carried[node] = set().union(*(carried[source] for source in node.all_input_nodes))
        return carried

    def _per_channel(self, node: fx.Node) -> bool:
        """Return whether a node is known to compute each channel from the same channel only."""
        if node in self.layers:
            return True
        module = self._module(node)
        if module is not None:
            own = any(kind in self._rules for kind in type(module).__mro__)
            return not own and isinstance(module, _PER_CHANNEL_MODULES)
        name = torch_function_name(node)
        if name == "size" or node.target is getattr:
            return _asks_for_images(node)
        if node.target in self._rules:
            return False
        if name in {"mean", "sum", "amax", "amin", "unsqueeze"}:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            dims = set(dim) if isinstance(dim, (list, tuple)) else {dim}
            behind = {2, 3, 4, -1} if name == "unsqueeze" else {2, 3}
            return dims <= behind or dims == {-1, -2}
        return name in _PER_CHANNEL_FUNCTIONS

    def _find_overwritten(
        self, nodes: Iterable[fx.Node]
    ) -> tuple[dict[fx.Node, AbstractSet[fx.Node]], bool]:
        """Return the nodes that share memory with in-place nodes, and whether one is used later."""
        origin: dict[fx.Node, fx.Node] = {}
        sharing: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        overwritten: dict[fx.Node, AbstractSet[fx.Node]] = {}
        entangled = False
        for node in nodes:
            first = next(iter(node.all_input_nodes), None)
            in_place = self._in_place(node)
            origin[node] = node
            if first is not None and (in_place or not self._makes_new(node)):
                origin[node] = origin[first]
            if in_place:
                overwritten[node] = set(sharing[origin[node]])
                entangled |= any(
                    self._order.get(user, math.inf) > self._order[node]
                    for earlier in overwritten[node]
                    for user in earlier.users
                )
            sharing[origin[node]].add(node)
        return overwritten, entangled

    def _in_place(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is not None:
            return bool(getattr(module, "inplace", False))
        if not node.op.startswith("call"):
            return False
        name = torch_function_name(node) or ""
        return (
            name.endswith("_")
            or name in _IN_PLACE.split()
            or node.kwargs.get("inplace") is True
            or (name in _ACTIVATIONS.split() and any(argument is True for argument in node.args))
        )

    def _makes_new(self, node: fx.Node) -> bool:
        """Return whether a node is known to share no memory with its first input."""
        module = self._module(node)
        if module is not None:
            return isinstance(module, _PER_CHANNEL_MODULES + _LAYERS) and not isinstance(
                module, _SHARING_MODULES
            )
        return torch_function_name(node) in _NEW_FUNCTIONS


def _asks_for_images(node: fx.Node) -> bool:
    """Return whether a size in the forward code is the batch size, not a number of channels."""
    if len(node.args) > 1 and node.op == "call_method":
        return bool(node.args[1] == 0)
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def followers(nodes: Iterable[fx.Node], seeds: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the seeds and all nodes that depend on one of them."""
    reached = set(seeds)
    for node in nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached
