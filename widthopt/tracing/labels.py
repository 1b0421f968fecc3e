"""Channel labels: what travels beside each tensor while a network is traced."""

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
        labels: One label for each block of entries; two-dimensional between the two views
            of a channel shuffle.
        repeat: Entries in each block: above 1 behind a flatten.
        dim: The tensor dimension that the (first) axis of the labels is.
        source: The node whose blocks ``places`` counts, while these labels are a
            rearrangement that is not recorded yet; empty otherwise.
        places: For each label, which block of ``source`` it is.
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
    """A parameter or buffer that the forward code reads itself."""

    name: str


class LabelledLayer(NamedTuple):
    """A convolution or linear layer, on labels; see `widthopt.widthgraph.Layer`."""

    name: str
    kind: str
    coefficient: int
    reads: Channels
    writes: Channels


class LabelledRewrite(NamedTuple):
    """An operation with channel counts in its code; see `widthopt.widthgraph.Rewrite`."""

    node: str
    kind: str
    source: str
    reads: Channels
    writes: Channels
    places: Labels


@dataclass
class Ledger:
    """Mints and ties labels, and keeps what the rules record, in forward order."""

    resolution: int
    layers: list[LabelledLayer] = field(default_factory=list)
    norms: list[tuple[str, bool, Channels]] = field(default_factory=list)
    parameters: dict[tuple[str, int], Channels] = field(default_factory=dict)
    rewrites: list[LabelledRewrite] = field(default_factory=list)
    sources: dict[str, Channels] = field(default_factory=dict)
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    minted: list[tuple[str, Labels]] = field(default_factory=list)
    fixed: list[Labels] = field(default_factory=list)
    count: int = 0

    def mint(self, name: str, count: int) -> Labels:
        """Fresh labels for the ``count`` channels that a module puts out."""
        labels = np.arange(self.count, self.count + count)
        self.count += count
        self.minted.append((name, labels))
        return labels

    def tie(self, one: Labels, other: Labels) -> None:
        """Join channels that must be removed together, entry by entry."""
        assert one.size == other.size
        self.ties.append((one.ravel(), other.ravel()))


@dataclass(frozen=True)
class Call:
    """One operation being traced, as a rule sees it.

    Attributes:
        ledger: Where labels are minted and tied, and layers recorded.
        node: The ``torch.fx`` node.
        module: The module called, or None for a function or method.
        args: Its arguments: `Channels` for tensors, everything else as it is.
        kwargs: Likewise.
        shapes: The shape of each argument that is a tensor, by position; else None.
        shape: The shape of the result, empty where that is not one tensor.
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
        """The module's name in the network, or the node's for a function."""
        return str(self.node.target) if self.module is not None else self.node.name

    @property
    def before(self) -> tuple[int, ...]:
        """The shape of the first argument."""
        return self.shapes[0] or ()

    @property
    def source(self) -> str:
        """The node that the first argument comes from."""
        first = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        assert isinstance(first, fx.Node)
        return first.name

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def dims(self, dim: int | Iterable[int] | None) -> list[int]:
        """Dimensions of the first argument, counted from the front; None is all of them."""
        if dim is None:
            return list(range(len(self.before)))
        return [one % len(self.before) for one in ([dim] if isinstance(dim, int) else dim)]

    def refuse(self, reason: str) -> InputError:
        """The error that names this node, its module and its operation."""
        return refusal(self.node, self.module, reason)

    def layer(
        self, kind: str, coefficient: int, reads: Channels, writes: Channels | None = None
    ) -> Channels:
        """Record a call of a layer with weights and return the channels that it writes.

        Without ``writes`` the layer's output channels are new. A module that is called
        again has the same weights, so its channels are those of its first call.
        """
        outputs = self.shape[reads.dim] if writes is None else 0
        first = next((one for one in self.ledger.layers if one.name == self.name), None)
        if first is not None:
            tie_operands(self, first.reads, reads)
            if writes is None:
                writes = Channels(first.writes.labels, dim=reads.dim)
            else:
                tie_operands(self, first.writes, writes)
        elif writes is None:
            writes = Channels(self.ledger.mint(self.name, outputs), dim=reads.dim)
        self.ledger.layers.append(LabelledLayer(self.name, kind, coefficient, reads, writes))
        return writes

    def parameter(self, name: str, dim: int, channels: Channels) -> None:
        """Record that axis ``dim`` of a parameter has these channels."""
        known = self.ledger.parameters.setdefault((name, dim), channels)
        if known is not channels:
            tie_operands(self, known, channels)

    def select(self, source: str, places: Labels, dim: int) -> Channels:
        """Record that the result is these blocks of another node, and return its channels."""
        reads = self.ledger.sources[source]
        writes = Channels(reads.labels[places], reads.repeat, dim)
        self.ledger.rewrites.append(
            LabelledRewrite(self.node.name, "select", source, reads, writes, places)
        )
        return writes


Rule = Callable[[Call], Any]
"""How one operation treats channels: from its `Call` to the `Channels` of its result."""


def refusal(node: fx.Node, module: nn.Module | None, reason: str) -> InputError:
    """The error for an operation that cannot be traced: node, module, operation, remedy."""
    operation = (
        type(module).__name__
        if module is not None
        else getattr(node.target, "__name__", str(node.target))
    )
    return InputError(
        f"network operation is `{operation}` (node `{node.name}` in {place(node)}), but "
        f"{reason}; give trace(rules={{...}}) or network.rules a rule for it, for example "
        "widthopt.tracing.same_channels where it keeps every channel to itself"
    )


def place(node: fx.Node) -> str:
    """The module that a node belongs to, in words."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [value[0] if isinstance(value, tuple) else key for key, value in stack.items()]
    return f"module `{paths[-1]}`" if paths else "the network's own forward"


def tie_operands(call: Call, one: Channels, other: Channels) -> Channels:
    """Tie two operands of one elementwise operation; the channels of the result."""
    if one is NONE or other is NONE:
        return other if one is NONE else one
    if (one.labels.shape, one.repeat) != (other.labels.shape, other.repeat):
        raise call.refuse("it combines tensors whose channels do not match one by one")
    call.ledger.tie(one.labels, other.labels)
    return one


def same_channels(call: Call) -> Any:
    """The rule of an operation that works on each channel alone and keeps them in order."""
    return call.args[0]


def tied_channels(call: Call) -> Any:
    """The rule of an operation that combines its operands entry by entry, with broadcasting."""
    operands = [
        (one, shape) for one, shape in zip(call.args, call.shapes, strict=True) if shape is not None
    ]
    result = NONE
    for one, shape in operands:
        if isinstance(one, Channels) and one is not NONE:
            dim = one.dim + len(call.shape) - len(shape)
            if call.shape[dim] != shape[one.dim]:
                call.ledger.fixed.append(one.labels)  # spread over the others' channels: stays 1
                continue
            if result is not NONE and dim != result.dim:
                raise call.refuse("it combines tensors whose channels lie on different axes")
            result = tie_operands(call, result, Channels(one.labels, one.repeat, dim))
    for one, shape in operands:
        dim = result.dim - (len(call.shape) - len(shape))
        if result is NONE or (isinstance(one, Channels) and one is not NONE) or dim < 0:
            continue
        if shape[dim] == call.shape[result.dim]:
            if not isinstance(one, ParameterValue) or result.entries == 1:
                raise call.refuse("one operand has an entry per channel of unknown origin")
            call.parameter(one.name, dim, result)
    return result


def flat(value: Any) -> Iterable[Any]:
    """Every leaf of nested tuples, lists and mappings."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and not isinstance(value, ParameterValue):
        for one in value:
            yield from flat(one)
    else:
        yield value


def torch_function_name(node: fx.Node) -> str | None:
    """The name of one of torch's own functions or tensor methods; None for anything else."""
    if node.op == "call_method":
        return str(node.target)
    target: Any = node.target
    name = str(getattr(target, "__name__", ""))
    if getattr(operator, name, None) is target or getattr(torch, name, None) is target:
        return name
    module = str(getattr(target, "__module__", None) or "")
    return name if module.partition(".")[0] in {"torch", "torchvision"} else None
