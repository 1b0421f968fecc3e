"""Assembly of a `WidthGraph` from the records of the rules: classes, width variables, axes."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from widthopt.tracing.labels import Channels, Labels, Ledger
from widthopt.widthgraph import (
    Axis,
    Layer,
    Norm,
    Parameter,
    Rewrite,
    Span,
    Stage,
    Variable,
    WidthGraph,
)


def assemble(ledger: Ledger, stages: tuple[Stage, ...]) -> WidthGraph:
    """Return the graph of a traced network from its ledger."""
    assembly = _Assembly(ledger)
    return WidthGraph(
        resolution=ledger.resolution,
        variables=tuple(assembly.variables),
        layers=tuple(
            Layer(
                layer.name,
                layer.kind,  # type: ignore[arg-type]  # the rules use the three kinds
                layer.coefficient,
                assembly.axis(layer.reads),
                assembly.axis(layer.writes),
            )
            for layer in ledger.layers
        ),
        norms=tuple(
            Norm(name, gamma, assembly.axis(channels)) for name, gamma, channels in ledger.norms
        ),
        parameters=tuple(
            Parameter(name, dim, assembly.axis(channels))
            for (name, dim), channels in ledger.parameters.items()
        ),
        rewrites=tuple(
            Rewrite(
                rewrite.node,
                rewrite.kind,  # type: ignore[arg-type]  # the rules use the two kinds
                rewrite.source,
                rewrite.writes.dim,
                assembly.axis(rewrite.reads),
                assembly.axis(rewrite.writes),
                assembly.picks(rewrite.reads, rewrite.places),
            )
            for rewrite in ledger.rewrites
        ),
        stages=stages,
    )


class _Blocks(NamedTuple):
    """The blocks of an axis: each array has one entry for each block.

    Consecutive labels of one class, as a grouped convolution creates them, are one block.
    """

    variables: Labels
    classes: Labels
    sizes: Labels


class _Assembly:
    """Groups classes into variables and converts axes to spans."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._roots = _roots(ledger.count, ledger.ties)
        self._variable = np.full(ledger.count, -1)  # by root: the variable
        self._class = np.full(ledger.count, -1)  # by root: the class within the variable
        self.variables: list[Variable] = []
        self._block = self._sort()

    def _sort(self) -> Labels:
        """Group classes into variables; return the labels in one block, by variable."""
        ledger, buckets, created = self._ledger, self._buckets(), dict(self._ledger.created)
        fixed = {root for labels in ledger.fixed for root in self._roots[labels].tolist()}
        writers = self._writers()
        members: dict[tuple[int, bool], dict[int, None]] = {}
        for labels in created.values():
            for root in self._roots[labels].tolist():
                members.setdefault((int(buckets[root]), root in fixed), {})[root] = None
        uses: dict[str, int] = defaultdict(int)
        blocks = []
        for (_, is_fixed), roots in members.items():
            leader, *_ = roots
            first = writers[leader][0]
            uses[first] += 1
            name = first if uses[first] == 1 else f"{first}:{uses[first]}"
            written = self._roots[created[first]] == leader
            self._variable[list(roots)] = len(self.variables)
            self._class[list(roots)] = np.arange(len(roots))
            unit = int(written.sum())
            blocks.append(_longest_streak(written))
            self.variables.append(
                Variable(name, unit * len(roots), unit, not is_fixed, tuple(writers[leader]))
            )
        return np.array(blocks)

    def _buckets(self) -> Labels:
        """Return by root a number that is equal for classes in exactly the same axes.

        Axes that are read count too, because a layer may read only half of the output of another
        layer. Each axis in turn splits the buckets of which it contains a part.
        """
        ledger = self._ledger
        axes = [Channels(labels) for _, labels in ledger.created]
        for layer in ledger.layers:
            axes += [layer.reads, layer.writes]
        axes += [channels for _, _, channels in ledger.norms]
        axes += ledger.parameters.values()
        buckets, used = np.zeros(ledger.count, dtype=np.int64), 1
        for channels in axes:
            roots, counts = np.unique(self._roots[channels.labels], return_counts=True)
            counts *= channels.repeat
            keys = buckets[roots] * (counts.max() + 1) + counts
            split, places = np.unique(keys, return_inverse=True)
            buckets[roots] = used + places
            used += len(split)
        return buckets

    def _writers(self) -> dict[int, list[str]]:
        """Return for each class the modules whose output it is, in forward order."""
        writers: dict[int, dict[str, None]] = defaultdict(dict)
        layers = iter(self._ledger.layers)
        written = [(name, labels) for name, labels in self._ledger.created if name == "image"]
        written += [(layer.name, layer.writes.labels) for layer in layers]
        for name, labels in written:
            for root in np.unique(self._roots[labels]).tolist():
                writers[root][name] = None
        return {root: list(names) for root, names in writers.items()}

    def _blocks(self, channels: Channels) -> _Blocks:
        labels = self._roots[channels.labels]
        starts = np.flatnonzero(np.diff(labels, prepend=-1))  # of stretches of one class
        roots, lengths = labels[starts], np.diff(starts, append=len(labels))
        variables = self._variable[roots]
        full, single = np.divmod(lengths, self._block[variables])
        counts = full + single
        stretch = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(len(stretch)) - np.repeat(counts.cumsum() - counts, counts)
        sizes = np.where(within < full[stretch], self._block[variables][stretch], 1)
        return _Blocks(variables[stretch], self._class[roots][stretch], sizes)

    def axis(self, channels: Channels) -> Axis:
        """Return an axis as spans of consecutive classes."""
        variables, classes, sizes = self._blocks(channels)
        new = (np.diff(variables) != 0) | (np.diff(sizes) != 0) | (np.diff(classes) != 1)
        starts = np.concatenate([[0], np.flatnonzero(new) + 1])
        lengths = np.diff(starts, append=len(variables))
        columns = (variables[starts], classes[starts], lengths, sizes[starts] * channels.repeat)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return tuple(Span(*row) for row in rows)

    def picks(self, reads: Channels, places: Labels) -> tuple[int, ...]:
        """Convert places of labels to places of blocks."""
        picks: list[int] = []
        sizes = self._blocks(reads).sizes
        starts = dict(
            zip((sizes.cumsum() - sizes).tolist(), enumerate(sizes.tolist()), strict=True)
        )
        position = 0
        labels = places.tolist()
        while position < len(labels):
            number, size = starts.get(labels[position], (-1, 1))
            picks.append(number)
            position += size
        return tuple(picks)


def _longest_streak(flags: Iterable[bool]) -> int:
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest


def _roots(count: int, ties: Sequence[tuple[Labels, Labels]]) -> Labels:
    """Return the smallest label of the class of each label, from a disjoint-set forest."""
    parent = list(range(count))

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for left, right in ties:
        for pair in zip(left.tolist(), right.tolist(), strict=True):
            first, second = map(root, pair)
            if first != second:
                parent[max(first, second)] = min(first, second)
    return np.array([root(label) for label in range(count)], dtype=np.int64)
