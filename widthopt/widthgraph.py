"""Width variables and MACs of a network, as plain data.

A *width variable* is a channel count that several layers share because the topology ties
them. Its channels fall into *classes*: channels that can only be removed together, because
residual sums, depthwise or grouped convolutions join them; mostly a class is one channel of
each layer. An *axis* is one channel axis of a layer, described as runs of classes. MACs are
a polynomial in the class counts, of degree two at most, and this is its only home.

Reading a graph needs neither torch nor numpy.
"""

import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from widthopt.errors import InputError


FORMAT = 1
"""Version of the JSON form."""


class Span(NamedTuple):
    """``classes`` classes of a variable from ``start`` on, each ``repeat`` entries long.

    ``repeat`` is above 1 where one channel fills several entries of the axis: behind a
    flatten (height x width), or where a whole group of a grouped convolution is one class.
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
            that is spread over the channels of another tensor.
        writers: Every module whose output it is, in forward order.
    """

    name: str
    channels: int
    unit: int
    free: bool
    writers: tuple[str, ...]

    @property
    def classes(self) -> int:
        """How many classes the variable has."""
        return self.channels // self.unit


@dataclass(frozen=True, slots=True)
class Layer:
    """One call of a convolution or linear layer.

    Its MACs are ``coefficient * len(reads) * len(writes)`` where it is dense, and
    ``coefficient * len(writes)`` where it is depthwise or grouped: the inputs of one group
    are then a constant inside the coefficient.
    """

    name: str
    kind: Literal["dense", "depthwise", "grouped"]
    coefficient: int
    reads: Axis
    writes: Axis


@dataclass(frozen=True, slots=True)
class Norm:
    """One call of a normalisation layer; ``gamma`` says whether it is an affine BatchNorm."""

    name: str
    gamma: bool
    axis: Axis


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer outside those layers with a channel axis, such as a layer scale."""

    name: str
    dim: int
    axis: Axis


@dataclass(frozen=True, slots=True)
class Rewrite:
    """An operation of the forward code that has channel counts written into it.

    ``select``: a split, slice or shuffle; entry blocks ``picks`` of ``source`` (axis
    ``reads``) make up the output (axis ``writes``). ``flatten``: a reshape to a literal size.
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


class Quadratic(NamedTuple):
    """A polynomial in the class counts of the free variables, by their index in the graph."""

    pairs: dict[tuple[int, int], int]
    linear: dict[int, int]
    constant: int


@dataclass(frozen=True)
class WidthGraph:
    """What the channel counts of a network mean: which layers they size, and what they cost.

    Attributes:
        resolution: Side of the square input that the MACs are for, in pixels.
        variables: All width variables, in forward order, the fixed ones too.
        layers: Calls of convolutions and linear layers, in forward order.
        norms: Calls of normalisation layers.
        parameters: Other parameters with a channel axis.
        rewrites: Operations that must be rewritten at other channel counts.
        stages: Where stages and blocks lie; empty where nobody said.
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

        These are the ones that an algorithm can scale, or switch off, by BatchNorm.
        """
        scaled: dict[int, set[int]] = defaultdict(set)
        for norm in self.norms:
            for run in norm.axis if norm.gamma else ():
                scaled[run.variable].update(range(run.start, run.start + run.classes))
        return tuple(
            variable.name
            for index, variable in enumerate(self.variables)
            if variable.free and len(scaled[index]) == variable.classes
        )

    @property
    def channels(self) -> dict[str, int]:
        """Channel count of each free width variable of the traced network."""
        return {name: variable.channels for name, variable in self.free.items()}

    def form(self, axis: Axis) -> dict[int, int]:
        """The length of an axis as a linear form: entries per class, by variable index."""
        entries: dict[int, int] = defaultdict(int)
        for run in axis:
            entries[run.variable] += run.classes * run.repeat
        return {index: total // self.variables[index].classes for index, total in entries.items()}

    def length(self, axis: Axis) -> int:
        """Entries of an axis in the traced network."""
        return sum(run.classes * run.repeat for run in axis)

    @cached_property
    def quadratic(self) -> Quadratic:
        """MACs of one forward pass on one image, as a polynomial in the class counts.

        Multiply-adds of convolutions and linear layers; bias, normalisation, activation,
        pooling and sums cost nothing (style guide 4.2).
        """
        pairs: dict[tuple[int, int], int] = defaultdict(int)
        linear: dict[int, int] = defaultdict(int)
        constant = 0
        for layer in self.layers:
            written, writes = self._split(layer.writes)
            read, reads = self._split(layer.reads) if layer.kind == "dense" else (1, {})
            constant += layer.coefficient * read * written
            for one, other in ((reads, written), (writes, read)):
                for index, entries in one.items():
                    linear[index] += layer.coefficient * entries * other
            for first, entries in reads.items():
                for second, others in writes.items():
                    pair = (min(first, second), max(first, second))
                    pairs[pair] += layer.coefficient * entries * others
        return Quadratic(
            {pair: factor for pair, factor in pairs.items() if factor},
            {index: factor for index, factor in linear.items() if factor},
            constant,
        )

    def _split(self, axis: Axis) -> tuple[int, dict[int, int]]:
        """The fixed entries of an axis, and its entries per class of each free variable."""
        form = self.form(axis)
        fixed = sum(
            entries * self.variables[index].classes
            for index, entries in form.items()
            if not self.variables[index].free
        )
        return fixed, {i: entries for i, entries in form.items() if self.variables[i].free}

    def macs(self, channels: Mapping[str, Any] | None = None) -> Any:
        """Multiply-adds of one forward pass on one image, what the paper calls FLOPs.

        Args:
            channels: Count of each free width variable: whole numbers, or expectations
                (floats, 0-d tensors), for which the result is of the same kind. None is
                the traced network.

        Returns:
            An exact ``int`` for whole numbers.

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
        """MACs that one more channel of each free width variable would add, to first order."""
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
        """Counts of classes by variable index, checked."""
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
                f"channels is a table of {len(channels)} names, but this network has "
                f"{len(self.free)} free width variables (missing: {first_names(missing)}; unknown: "
                f"{first_names(unknown)}); `widthopt macs` lists them"
            )

    def connected_without(self, name: str) -> bool:
        """Whether the image still reaches the outputs if a width variable has no channels.

        True for what a shortcut goes around; False for a residual stream, or a layer of a
        chain: without it the network is cut in two.
        """
        reached = {index for index, one in enumerate(self.variables) if one.writers == ("image",)}
        outputs = {i for i, one in enumerate(self.variables) if not one.free} - reached
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
        """The graph of the same network at other channel counts.

        Args:
            channels: Count of each free width variable, from 1 up.
            keep: Classes that stay, ascending, by variable name; where a variable is not
                named, its classes are spread evenly over the old ones.

        Raises:
            InputError: As `check`, or a variable is laid out so that it cannot change.
        """
        self.check(channels)
        origins = self.origins(channels, keep)

        def axis(old: Axis) -> Axis:
            return tuple(run for one in old if (run := self._resized_run(one, origins)).classes)

        return replace(
            self,
            variables=tuple(
                replace(variable, channels=channels.get(variable.name, variable.channels))
                for variable in self.variables
            ),
            layers=tuple(
                replace(layer, reads=axis(layer.reads), writes=axis(layer.writes))
                for layer in self.layers
            ),
            norms=tuple(replace(norm, axis=axis(norm.axis)) for norm in self.norms),
            parameters=tuple(replace(one, axis=axis(one.axis)) for one in self.parameters),
            rewrites=tuple(
                replace(
                    one,
                    reads=axis(one.reads),
                    writes=axis(one.writes),
                    picks=self._resized_picks(one, origins),
                )
                for one in self.rewrites
            ),
        )

    def origins(
        self, channels: Mapping[str, int], keep: Mapping[str, Sequence[int]] | None = None
    ) -> dict[int, Sequence[int]]:
        """By variable index: for each class at these counts, the old class whose place it takes.

        Args:
            channels: Count of each free width variable.
            keep: Classes that stay, ascending, by variable name; the classes of a variable
                that is not named are spread evenly over the old ones.
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

    def _resized_run(self, run: Span, origins: Mapping[int, Sequence[int]]) -> Span:
        first = bisect_left(origins[run.variable], run.start)
        last = bisect_left(origins[run.variable], run.start + run.classes)
        return run._replace(start=first, classes=last - first)

    def _resized_picks(
        self, rewrite: Rewrite, origins: Mapping[int, Sequence[int]]
    ) -> tuple[int, ...]:
        """Where the picked blocks of a `select` lie once every block is resized in place."""
        places: list[range] = []
        position = 0
        for run in rewrite.reads:
            copies = Counter(origins[run.variable])
            for number in range(run.start, run.start + run.classes):
                places.append(range(position, position + copies[number]))
                position += copies[number]
        return tuple(place for pick in rewrite.picks for place in places[pick])

    def entries(self, axis: Axis, origins: Mapping[int, Sequence[int]]) -> list[int]:
        """For each entry of an axis of the resized network, the old entry whose place it takes.

        Args:
            axis: An axis of this graph.
            origins: As `origins` returns them.
        """
        places: list[int] = []
        position = 0
        for run in axis:
            copies = Counter(origins[run.variable])
            for number in range(run.start, run.start + run.classes):
                places.extend(list(range(position, position + run.repeat)) * copies[number])
                position += run.repeat
        return places

    def to_json(self) -> str:
        """The graph as JSON text; `from_json` reads it back."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "WidthGraph":
        """Read what `to_json` wrote.

        Raises:
            InputError: The text is not such a graph.
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
                Variable(**{**one, "writers": tuple(one["writers"])}) for one in data["variables"]
            ),
            layers=tuple(Layer(**_axes(one, "reads", "writes")) for one in data["layers"]),
            norms=tuple(Norm(**_axes(one, "axis")) for one in data["norms"]),
            parameters=tuple(Parameter(**_axes(one, "axis")) for one in data["parameters"]),
            rewrites=tuple(
                Rewrite(**{**_axes(one, "reads", "writes"), "picks": tuple(one["picks"])})
                for one in data["rewrites"]
            ),
            stages=tuple(Stage(one["name"], tuple(one["blocks"])) for one in data["stages"]),
        )


def _check_count(variable: Variable, count: Any, *, least: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise InputError(
            f"channels.{variable.name} is {count}, but it must be a whole number from {least} up; "
            f"the network as traced has {variable.channels}"
        )
    if count % variable.unit:
        raise InputError(
            f"channels.{variable.name} is {count}, but its channels come in groups of "
            f"{variable.unit}; use a multiple of {variable.unit}"
        )


def first_names(names: Sequence[str], most: int = 3) -> str:
    """The first few names, for a message."""
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _axes(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A record read from JSON with the named axes made tuples of runs again."""
    axes = {name: tuple(Span(*map(int, run)) for run in data[name]) for name in names}
    return {**data, **axes}
