"""Width variables and MACs of a network, as plain data.

A *width variable* is a channel count that several layers share because the topology ties
them. Its channels fall into *classes*: channels that can only be removed together, because
residual sums, depthwise or grouped convolutions join them. Usually a class is one channel of
each layer. An *axis* is one channel axis of a layer, described as spans of classes. MACs are
a polynomial of degree at most two in the class counts, which only this module computes.

Reading a graph needs neither torch nor numpy.
"""

import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar, overload

from widthopt.errors import InputError


FORMAT = 1
"""Version of the JSON form."""

Count = TypeVar("Count")
"""The type of channel counts: ``int``, or ``float`` or 0-d tensors for expectations."""


class Span(NamedTuple):
    """``classes`` consecutive classes of a variable from ``start``, each ``repeat`` entries long.

    ``repeat`` is above 1 where one channel fills several entries of the axis: after a
    flatten (height x width), or where a group of a grouped convolution is one class.
    """

    variable: int
    start: int
    classes: int
    repeat: int


Axis = tuple[Span, ...]
"""The entries of one channel axis, in order."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One width variable.

    Attributes:
        name: The first module, in forward order, whose output it is.
        channels: Its size in the traced network.
        unit: Channels in one class; channel counts are multiples of it.
        free: False for the image's channels, the network's outputs, and a single channel
            that is broadcast over the channels of another tensor.
        writers: The modules whose output it is, in forward order.
    """

    name: str
    channels: int
    unit: int
    free: bool
    writers: tuple[str, ...]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.channels // self.unit


@dataclass(frozen=True, slots=True)
class Layer:
    """One call of a convolution or linear layer.

    A dense layer has ``coefficient * len(reads) * len(writes)`` MACs. A depthwise or grouped
    layer has ``coefficient * len(writes)``, because the number of inputs of a group is constant
    and part of the coefficient.
    """

    name: str
    kind: Literal["dense", "depthwise", "grouped"]
    coefficient: int
    reads: Axis
    writes: Axis


@dataclass(frozen=True, slots=True)
class Norm:
    """One call of a normalisation layer; ``gamma`` is True for an affine BatchNorm."""

    name: str
    gamma: bool
    axis: Axis


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer of no such layer with a channel axis, for example a layer scale."""

    name: str
    dim: int
    axis: Axis


@dataclass(frozen=True, slots=True)
class Rewrite:
    """An operation of the forward code that contains literal channel counts.

    ``select`` is a split, slice or shuffle: its output (axis ``writes``) consists of the entry
    blocks ``picks`` of ``source`` (axis ``reads``). ``flatten`` is a reshape to a literal size.
    """

    node: str
    kind: Literal["select", "flatten"]
    source: str
    dim: int
    reads: Axis = ()
    writes: Axis = ()
    picks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks that share one output resolution; ``blocks`` are module names, in order."""

    name: str
    blocks: tuple[str, ...]


class ScaleSlice(NamedTuple):
    """Where the scales of consecutive classes are in the weight of one BatchNorm.

    ``model.get_submodule(norm).weight[entries].reshape(len(classes), -1)`` has one row for each
    class.

    Attributes:
        norm: Name of the BatchNorm module.
        entries: The part of its weight (and of its bias).
        classes: The classes of the width variable, in the order of the rows.
    """

    norm: str
    entries: slice
    classes: range


class Quadratic(NamedTuple):
    """A polynomial in the class counts of the free variables, by their index in the graph."""

    pairs: dict[tuple[int, int], int]
    linear: dict[int, int]
    constant: int


@dataclass(frozen=True)
class WidthGraph:
    """The width variables of a network, the layers that they size, and its MACs.

    Attributes:
        resolution: Side of the square input that the MACs are for, in pixels.
        variables: All width variables, including the fixed ones, in forward order.
        layers: Calls of convolutions and linear layers, in forward order.
        norms: Calls of normalisation layers.
        parameters: Further parameters with a channel axis.
        rewrites: Operations that must be rewritten at different channel counts.
        stages: The stages and their blocks; empty if they were not given.
    """

    resolution: int
    variables: tuple[Variable, ...]
    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    stages: tuple[Stage, ...] = ()

    @cached_property
    def free(self) -> dict[str, Variable]:
        """The free width variables by name, in forward order."""
        return {variable.name: variable for variable in self.variables if variable.free}

    @cached_property
    def searchable(self) -> tuple[str, ...]:
        """The free width variables whose every channel passes an affine BatchNorm, in order.

        An algorithm can scale their channels, or switch them off, through BatchNorm.
        """
        scaled = {
            name: {number for part in self.scale_slices(name) for number in part.classes}
            for name in self.free
        }
        return tuple(name for name in scaled if len(scaled[name]) == self.free[name].classes)

    @cached_property
    def scale_axes(self) -> dict[str, Axis]:
        """The axis of the scale of each affine BatchNorm by module name, in forward order."""
        return {norm.name: norm.axis for norm in self.norms if norm.gamma}

    def scale_slices(self, name: str) -> tuple[ScaleSlice, ...]:
        """Return where the BatchNorm scales of a width variable are, in forward order.

        A class may have several scales: each BatchNorm that its channels pass has at least one.
        It has none where its channels pass no affine BatchNorm; `searchable` lists the free
        variables whose every class has a scale.

        Args:
            name: Name of the width variable.

        Raises:
            InputError: The network has no such width variable.
        """
        names = [variable.name for variable in self.variables]
        if name not in names:
            raise InputError(
                f"name is {name}, but this network has no such width variable; `widthopt macs` "
                "lists them"
            )
        index = names.index(name)
        slices = []
        for norm, axis in self.scale_axes.items():
            position = 0
            for span in axis:
                end = position + span.classes * span.repeat
                if span.variable == index:
                    classes = range(span.start, span.start + span.classes)
                    slices.append(ScaleSlice(norm, slice(position, end), classes))
                position = end
        return tuple(slices)

    @property
    def channels(self) -> dict[str, int]:
        """Channel count of each free width variable of the traced network."""
        return {name: variable.channels for name, variable in self.free.items()}

    def form(self, axis: Axis) -> dict[int, int]:
        """Return the length of an axis as a linear form: entries per class by variable index."""
        entries: dict[int, int] = defaultdict(int)
        for span in axis:
            entries[span.variable] += span.classes * span.repeat
        return {index: total // self.variables[index].classes for index, total in entries.items()}

    def length(self, axis: Axis) -> int:
        """Return the number of entries of an axis in the traced network."""
        return sum(span.classes * span.repeat for span in axis)

    @cached_property
    def quadratic(self) -> Quadratic:
        """MACs of one forward pass on one image, as a polynomial in the class counts.

        It counts the multiply-adds of convolutions and linear layers. Biases, normalisation,
        activations, pooling and sums are not counted, as in the papers.
        """
        pairs: dict[tuple[int, int], int] = defaultdict(int)
        linear: dict[int, int] = defaultdict(int)
        constant = 0
        for layer in self.layers:
            written, writes = self._split(layer.writes)
            read, reads = self._split(layer.reads) if layer.kind == "dense" else (1, {})
            constant += layer.coefficient * read * written
            for form, fixed in ((reads, written), (writes, read)):
                for index, entries in form.items():
                    linear[index] += layer.coefficient * entries * fixed
            for first, inputs in reads.items():
                for second, outputs in writes.items():
                    pair = (min(first, second), max(first, second))
                    pairs[pair] += layer.coefficient * inputs * outputs
        return Quadratic(
            {pair: factor for pair, factor in pairs.items() if factor},
            {index: factor for index, factor in linear.items() if factor},
            constant,
        )

    def _split(self, axis: Axis) -> tuple[int, dict[int, int]]:
        """Return the fixed entries of an axis and its entries per class of each free variable."""
        form = self.form(axis)
        fixed = sum(
            entries * self.variables[index].classes
            for index, entries in form.items()
            if not self.variables[index].free
        )
        return fixed, {i: entries for i, entries in form.items() if self.variables[i].free}

    @overload
    def macs(self, channels: None = None) -> int: ...

    @overload
    def macs(self, channels: Mapping[str, Count]) -> Count: ...

    def macs(self, channels: Mapping[str, Any] | None = None) -> Any:
        """Return the multiply-adds of one forward pass on one image (FLOPs in the paper).

        Args:
            channels: Count of each free width variable: integers, or expectations (floats or
                0-d tensors). None stands for the counts of the traced network.

        Returns:
            The MACs, of the type of the counts; an exact ``int`` for integers.

        Raises:
            InputError: A variable is missing or unknown, or a count is negative or not a
                multiple of its variable's unit.
        """
        counts = self._class_counts(self.channels if channels is None else channels)
        quadratic = self.quadratic
        total: Any = quadratic.constant
        for index, factor in quadratic.linear.items():
            total = total + factor * counts[index]
        for (first, second), factor in quadratic.pairs.items():
            total = total + factor * counts[first] * counts[second]
        return total

    def gradient(self, channels: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the MACs that a channel more of each free width variable adds, to first order."""
        counts = self._class_counts(self.channels if channels is None else channels)
        slopes: dict[int, Any] = dict(self.quadratic.linear)
        for (first, second), factor in self.quadratic.pairs.items():
            slopes[first] = slopes.get(first, 0) + factor * counts[second]
            slopes[second] = slopes.get(second, 0) + factor * counts[first]
        return {
            variable.name: slopes.get(index, 0) / variable.unit
            for index, variable in enumerate(self.variables)
            if variable.free
        }

    def _class_counts(self, channels: Mapping[str, Any]) -> dict[int, Any]:
        """Check channel counts and return the counts of classes by variable index."""
        self._check_names(channels)
        counts: dict[int, Any] = {}
        for index, variable in enumerate(self.variables):
            if not variable.free:
                continue
            count = channels[variable.name]
            if isinstance(count, int):
                _check_count(variable, count, least=0)
                counts[index] = count // variable.unit
            else:
                counts[index] = count / variable.unit
        return counts

    def _check_names(self, channels: Mapping[str, Any]) -> None:
        missing = [name for name in self.free if name not in channels]
        unknown = [name for name in channels if name not in self.free]
        if missing or unknown:
            raise InputError(
                f"channels is a mapping of {len(channels)} names, but this network has "
                f"{len(self.free)} free width variables (missing: {first_names(missing)}; unknown: "
                f"{first_names(unknown)}); `widthopt macs` lists them"
            )

    def connected_without(self, name: str) -> bool:
        """Return whether the image reaches the outputs if a width variable has no channels.

        True for a variable that a shortcut bypasses. False for a residual stream, or for a layer
        of a chain: the network without it is disconnected.
        """
        reached = {i for i, variable in enumerate(self.variables) if variable.writers == ("image",)}
        outputs = {i for i, variable in enumerate(self.variables) if not variable.free} - reached
        grown = True
        while grown:
            before = len(reached)
            for layer in self.layers:
                if reached & self.form(layer.reads).keys():
                    writes = self.form(layer.writes).keys()
                    reached |= {i for i in writes if self.variables[i].name != name}
            grown = len(reached) > before
        return outputs <= reached

    def check(self, channels: Mapping[str, int]) -> None:
        """Raise InputError unless a network can be built at these channel counts."""
        self._check_names(channels)
        for name, variable in self.free.items():
            _check_count(variable, channels[name], least=1)

    def resize_graph(
        self, channels: Mapping[str, int], *, keep: Mapping[str, Sequence[int]] | None = None
    ) -> "WidthGraph":
        """Return the graph of the same network at the given channel counts.

        Args:
            channels: Count of each free width variable, at least 1.
            keep: Classes to keep, ascending, by variable name. The classes of a variable that is
                not named are spread evenly over the old ones.

        Raises:
            InputError: See `check`.
        """
        self.check(channels)
        origins = self.origins(channels, keep)

        def resize_axis(axis: Axis) -> Axis:
            spans = (self._resize_span(span, origins) for span in axis)
            return tuple(span for span in spans if span.classes)

        return replace(
            self,
            variables=tuple(
                replace(variable, channels=channels.get(variable.name, variable.channels))
                for variable in self.variables
            ),
            layers=tuple(
                replace(layer, reads=resize_axis(layer.reads), writes=resize_axis(layer.writes))
                for layer in self.layers
            ),
            norms=tuple(replace(norm, axis=resize_axis(norm.axis)) for norm in self.norms),
            parameters=tuple(
                replace(parameter, axis=resize_axis(parameter.axis))
                for parameter in self.parameters
            ),
            rewrites=tuple(
                replace(
                    rewrite,
                    reads=resize_axis(rewrite.reads),
                    writes=resize_axis(rewrite.writes),
                    picks=self._resize_picks(rewrite, origins),
                )
                for rewrite in self.rewrites
            ),
        )

    def origins(
        self, channels: Mapping[str, int], keep: Mapping[str, Sequence[int]] | None = None
    ) -> dict[int, Sequence[int]]:
        """Return the old class of each class at the given counts, by variable index.

        Args:
            channels: Count of each free width variable.
            keep: Classes to keep, ascending, by variable name. The classes of a variable that is
                not named are spread evenly over the old ones.
        """
        origins: dict[int, Sequence[int]] = {}
        for index, variable in enumerate(self.variables):
            if not variable.free:
                origins[index] = range(variable.classes)
                continue
            count = channels[variable.name] // variable.unit
            kept = None if keep is None else keep.get(variable.name)
            if kept is None:
                kept = [new * variable.classes // count for new in range(count)]
            assert len(kept) == count, f"{variable.name}: {len(kept)} classes kept, not {count}"
            origins[index] = kept
        return origins

    def _resize_span(self, span: Span, origins: Mapping[int, Sequence[int]]) -> Span:
        first = bisect_left(origins[span.variable], span.start)
        last = bisect_left(origins[span.variable], span.start + span.classes)
        return span._replace(start=first, classes=last - first)

    def _resize_picks(
        self, rewrite: Rewrite, origins: Mapping[int, Sequence[int]]
    ) -> tuple[int, ...]:
        """Return the picked blocks of a ``select`` after every block is resized in place."""
        places: list[range] = []
        position = 0
        for span in rewrite.reads:
            copies = Counter(origins[span.variable])
            for number in range(span.start, span.start + span.classes):
                places.append(range(position, position + copies[number]))
                position += copies[number]
        return tuple(place for pick in rewrite.picks for place in places[pick])

    def entries(self, axis: Axis, origins: Mapping[int, Sequence[int]]) -> list[int]:
        """Return the old entry of each entry of an axis of the resized network.

        Args:
            axis: An axis of this graph.
            origins: As `origins` returns them.
        """
        places: list[int] = []
        position = 0
        for span in axis:
            copies = Counter(origins[span.variable])
            for number in range(span.start, span.start + span.classes):
                places.extend(list(range(position, position + span.repeat)) * copies[number])
                position += span.repeat
        return places

    def to_json(self) -> str:
        """Return the graph as a JSON string, which `from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "WidthGraph":
        """Read the output of `to_json`.

        Raises:
            InputError: The string is not a width graph.
        """
        try:
            data = json.loads(text)
            version = data["format"]
            graph = cls._of(data) if version == FORMAT else None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"graph is not a width graph ({error}), but JSON that `to_json` wrote is needed; "
                "trace the network again"
            ) from error
        if graph is None:
            raise InputError(
                f"graph format is {version}, but this version reads {FORMAT}; trace the network "
                "again"
            )
        return graph

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> "WidthGraph":
        return cls(
            resolution=int(data["resolution"]),
            variables=tuple(
                Variable(**{**variable, "writers": tuple(variable["writers"])})
                for variable in data["variables"]
            ),
            layers=tuple(Layer(**_read_axes(layer, "reads", "writes")) for layer in data["layers"]),
            norms=tuple(Norm(**_read_axes(norm, "axis")) for norm in data["norms"]),
            parameters=tuple(
                Parameter(**_read_axes(parameter, "axis")) for parameter in data["parameters"]
            ),
            rewrites=tuple(
                Rewrite(
                    **{**_read_axes(rewrite, "reads", "writes"), "picks": tuple(rewrite["picks"])}
                )
                for rewrite in data["rewrites"]
            ),
            stages=tuple(Stage(stage["name"], tuple(stage["blocks"])) for stage in data["stages"]),
        )


def _check_count(variable: Variable, count: Any, *, least: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise InputError(
            f"channels.{variable.name} is {count}, but it must be an integer of at least {least}; "
            f"the traced network has {variable.channels}"
        )
    if count % variable.unit:
        raise InputError(
            f"channels.{variable.name} is {count}, but its channels come in groups of "
            f"{variable.unit}; use a multiple of {variable.unit}"
        )


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names, for a message."""
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_axes(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return a mapping read from JSON with the named axes as tuples of spans."""
    axes = {name: tuple(Span(*map(int, span)) for span in data[name]) for name in names}
    return {**data, **axes}
