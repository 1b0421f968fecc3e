"""Channel labels of tensors while a network is traced."""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from widthopt.errors import InputError


Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Channels:
    """The labels of one tensor's channels.

    Attributes:
        labels: A label for each block of entries; two-dimensional between the two views of a
            channel shuffle.
        repeat: Entries in each block; above 1 after a flatten.
        dim: The tensor dimension of the first axis of the labels.
        source: The node that ``places`` refers to while these labels are a rearrangement that is
            not yet recorded; else empty.
        places: For each label the number of its block of ``source``.
    """

    labels: Labels
    repeat: int = 1
    dim: int = 1
    source: str = ""
    places: Labels | None = None

    @property
    def entries(self) -> int:
        """Length of the channel axis."""
        return self.labels.size * self.repeat


NONE = Channels(np.empty(0, dtype=np.int64), dim=-1)
"""A tensor without a channel axis."""


class ParameterValue(NamedTuple):
    """A parameter or buffer that the forward code reads directly."""

    name: str


class LabelledLayer(NamedTuple):
    """A convolution or linear layer with labels; see `widthopt.widthgraph.Layer`."""

    name: str
    kind: str
    coefficient: int
    reads: Channels
    writes: Channels


class LabelledRewrite(NamedTuple):
    """An operation with literal channel counts; see `widthopt.widthgraph.Rewrite`."""

    node: str
    kind: str
    source: str
    reads: Channels
    writes: Channels
    places: Labels


@dataclass
class Ledger:
    """Creates and ties labels, and stores the records of the rules in forward order."""

    resolution: int
    layers: list[LabelledLayer] = field(default_factory=list)
    norms: list[tuple[str, bool, Channels]] = field(default_factory=list)
    parameters: dict[tuple[str, int], Channels] = field(default_factory=dict)
    rewrites: list[LabelledRewrite] = field(default_factory=list)
    sources: dict[str, Channels] = field(default_factory=dict)
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    created: list[tuple[str, Labels]] = field(default_factory=list)
    fixed: list[Labels] = field(default_factory=list)
    count: int = 0

    def create(self, name: str, count: int) -> Labels:
        """Create labels for the ``count`` output channels of a module."""
        labels = np.arange(self.count, self.count + count)
        self.count += count
        self.created.append((name, labels))
        return labels

    def tie(self, first: Labels, second: Labels) -> None:
        """Tie channels that must be removed together, entry by entry."""
        assert first.size == second.size
        self.ties.append((first.ravel(), second.ravel()))


@dataclass(frozen=True)
class Call:
    """One operation that is being traced, the argument of a rule.

    Attributes:
        ledger: Creates and ties labels, and records layers.
        node: The ``torch.fx`` node.
        module: The module that is called, or None for a function or method.
        args: Its arguments: `Channels` in place of tensors, all else unchanged.
        kwargs: Its keyword arguments, likewise.
        shapes: By position the shape of each argument that is a tensor; None for the rest.
        shape: The shape of the result; empty if the result is not a single tensor.
    """

    ledger: Ledger
    node: fx.Node
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: tuple[tuple[int, ...] | None, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the module in the network, or of the node for a function."""
        return str(self.node.target) if self.module is not None else self.node.name

    @property
    def before(self) -> tuple[int, ...]:
        """The shape of the first argument."""
        return self.shapes[0] or ()

    @property
    def source(self) -> str:
        """Name of the node that returns the first argument."""
        first = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        assert isinstance(first, fx.Node)
        return first.name

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that is given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def dims(self, dim: int | Iterable[int] | None) -> list[int]:
        """Return dimensions of the first argument, counted from the front; all of them for None."""
        if dim is None:
            return list(range(len(self.before)))
        return [d % len(self.before) for d in ([dim] if isinstance(dim, int) else dim)]

    def refuse(self, reason: str) -> InputError:
        """Return the error that names this node, its module and its operation."""
        return refusal(self.node, self.module, reason)

    def layer(
        self, kind: str, coefficient: int, reads: Channels, writes: Channels | None = None
    ) -> Channels:
        """Record a call of a layer with weights and return its output channels.

        Without ``writes`` the output channels are new. A module that is called again has the
        same weights, so its channels are those of its first call.
        """
        outputs = self.shape[reads.dim] if writes is None else 0
        first = next((layer for layer in self.ledger.layers if layer.name == self.name), None)
        if first is not None:
            tie_operands(self, first.reads, reads)
            if writes is None:
                writes = Channels(first.writes.labels, dim=reads.dim)
            else:
                tie_operands(self, first.writes, writes)
        elif writes is None:
            writes = Channels(self.ledger.create(self.name, outputs), dim=reads.dim)
        self.ledger.layers.append(LabelledLayer(self.name, kind, coefficient, reads, writes))
        return writes

    def parameter(self, name: str, dim: int, channels: Channels) -> None:
        """Record that axis ``dim`` of a parameter has these channels."""
        known = self.ledger.parameters.setdefault((name, dim), channels)
        if known is not channels:
            tie_operands(self, known, channels)

    def select(self, source: str, places: Labels, dim: int) -> Channels:
        """Record that the result consists of blocks of another node, and return its channels."""
        reads = self.ledger.sources[source]
        writes = Channels(reads.labels[places], reads.repeat, dim)
        self.ledger.rewrites.append(
            LabelledRewrite(self.node.name, "select", source, reads, writes, places)
        )
        return writes


Rule = Callable[[Call], Any]
"""A function from the `Call` of an operation to the `Channels` of its result."""


def refusal(node: fx.Node, module: nn.Module | None, reason: str) -> InputError:
    """Return the error for an operation that cannot be traced."""
    operation = (
        type(module).__name__
        if module is not None
        else getattr(node.target, "__name__", str(node.target))
    )
    return InputError(
        f"network operation is `{operation}` (node `{node.name}` in {module_of(node)}), but "
        f"{reason}; add a rule for it to trace(rules={{...}}) or network.rules, for example "
        "widthopt.tracing.same_channels if it works on each channel alone"
    )


def module_of(node: fx.Node) -> str:
    """Return the module that a node belongs to, in words."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [value[0] if isinstance(value, tuple) else key for key, value in stack.items()]
    return f"module `{paths[-1]}`" if paths else "the forward of the network"


def has_channels(value: Any) -> bool:
    """Return whether a value stands for a tensor with a channel axis."""
    return isinstance(value, Channels) and value is not NONE


def tie_operands(call: Call, first: Channels, second: Channels) -> Channels:
    """Tie two operands of an elementwise operation, and return the channels of the result."""
    if first is NONE or second is NONE:
        return second if first is NONE else first
    if (first.labels.shape, first.repeat) != (second.labels.shape, second.repeat):
        raise call.refuse("it combines tensors whose channels do not match")
    call.ledger.tie(first.labels, second.labels)
    return first


def same_channels(call: Call) -> Any:
    """Rule of an operation that works on each channel alone and preserves their order."""
    return call.args[0]


def tied_channels(call: Call) -> Any:
    """Rule of an operation that combines its operands entry by entry, with broadcasting."""
    arguments = zip(call.args, call.shapes, strict=True)
    operands = [(operand, shape) for operand, shape in arguments if shape is not None]
    result = NONE
    for operand, shape in operands:
        if has_channels(operand):
            dim = operand.dim + len(call.shape) - len(shape)
            if call.shape[dim] != shape[operand.dim]:
                call.ledger.fixed.append(operand.labels)  # broadcast over channels: stays 1
                continue
            if result is not NONE and dim != result.dim:
                raise call.refuse("it combines tensors whose channels are on different axes")
            result = tie_operands(call, result, Channels(operand.labels, operand.repeat, dim))
    for operand, shape in operands:
        dim = result.dim - (len(call.shape) - len(shape))
        if result is NONE or has_channels(operand) or dim < 0:
            continue
        if shape[dim] == call.shape[result.dim]:
            if not isinstance(operand, ParameterValue) or result.entries == 1:
                raise call.refuse("an operand has an entry per channel, but no known origin")
            call.parameter(operand.name, dim, result)
    return result


def flat(value: Any) -> Iterable[Any]:
    """Yield every leaf of nested tuples, lists and mappings."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and not isinstance(value, ParameterValue):
        for item in value:
            yield from flat(item)
    else:
        yield value


def torch_function_name(node: fx.Node) -> str | None:
    """Return the name of a function or tensor method of torch; None for any other function."""
    if node.op == "call_method":
        return str(node.target)
    target: Any = node.target
    name = str(getattr(target, "__name__", ""))
    if getattr(operator, name, None) is target or getattr(torch, name, None) is target:
        return name
    module = str(getattr(target, "__module__", None) or "")
    return name if module.partition(".")[0] in {"torch", "torchvision"} else None
