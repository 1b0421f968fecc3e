"""From what the rules recorded to a `WidthGraph`: classes, width variables, axes."""

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
    """The graph of everything that was recorded while a network was traced."""
    assembly = _Assembly(ledger)
    return WidthGraph(
        resolution=ledger.resolution,
        variables=tuple(assembly.variables),
        layers=tuple(
            Layer(
                one.name,
                one.kind,  # type: ignore[arg-type]  # the rules use the three kinds
                one.coefficient,
                assembly.axis(one.reads),
                assembly.axis(one.writes),
            )
            for one in ledger.layers
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
                one.node,
                one.kind,  # type: ignore[arg-type]  # the rules use the two kinds
                one.source,
                one.writes.dim,
                assembly.axis(one.reads),
                assembly.axis(one.writes),
                assembly.picks(one.reads, one.places),
            )
            for one in ledger.rewrites
        ),
        stages=stages,
    )


class _Blocks(NamedTuple):
    """An axis block by block: one entry of each array for each block.

    The labels of one class that a grouped convolution made consecutive are one block.
    """

    variables: Labels
    classes: Labels
    sizes: Labels


class _Assembly:
    """Sorts classes into variables and writes axes as runs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._roots = _roots(ledger.count, ledger.ties)
        self._variable = np.full(ledger.count, -1)  # by root: its variable
        self._class = np.full(ledger.count, -1)  # by root: the class within it
        self.variables: list[Variable] = []
        self._block = self._sort()

    def _sort(self) -> Labels:
        """Bucket classes into variables; the consecutive labels of a class, by variable."""
        ledger, buckets, minted = self._ledger, self._buckets(), dict(self._ledger.minted)
        fixed = {root for labels in ledger.fixed for root in self._roots[labels].tolist()}
        writers = self._writers()
        members: dict[tuple[int, bool], dict[int, None]] = {}
        for labels in minted.values():
            for root in self._roots[labels].tolist():
                members.setdefault((int(buckets[root]), root in fixed), {})[root] = None
        taken: dict[str, int] = defaultdict(int)
        blocks = []
        for (_, is_fixed), roots in members.items():
            leader, *_ = roots
            first = writers[leader][0]
            taken[first] += 1
            name = first if taken[first] == 1 else f"{first}:{taken[first]}"
            written = self._roots[minted[first]] == leader
            self._variable[list(roots)] = len(self.variables)
            self._class[list(roots)] = np.arange(len(roots))
            unit = int(written.sum())
            blocks.append(_longest_run(written))
            self.variables.append(
                Variable(name, unit * len(roots), unit, not is_fixed, tuple(writers[leader]))
            )
        return np.array(blocks)

    def _buckets(self) -> Labels:
        """By root: a number that classes share if exactly the same axes contain them.

        Reading axes are included. Producers alone would not do: half of a layer's output may
        go elsewhere. Each axis in turn splits the buckets that it cuts through.
        """
        ledger = self._ledger
        axes = [Channels(labels) for _, labels in ledger.minted]
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
        """For each class, the modules whose output it is, in forward order."""
        writers: dict[int, dict[str, None]] = defaultdict(dict)
        layers = iter(self._ledger.layers)
        written = [(name, labels) for name, labels in self._ledger.minted if name == "image"]
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
        """An axis as runs of consecutive classes."""
        variables, classes, sizes = self._blocks(channels)
        new = (np.diff(variables) != 0) | (np.diff(sizes) != 0) | (np.diff(classes) != 1)
        starts = np.concatenate([[0], np.flatnonzero(new) + 1])
        lengths = np.diff(starts, append=len(variables))
        columns = (variables[starts], classes[starts], lengths, sizes[starts] * channels.repeat)
        return tuple(Span(*run) for run in zip(*(one.tolist() for one in columns), strict=True))

    def picks(self, reads: Channels, places: Labels) -> tuple[int, ...]:
        """Places of labels, as places of blocks."""
        picks: list[int] = []
        sizes = self._blocks(reads).sizes
        starts = dict(
            zip((sizes.cumsum() - sizes).tolist(), enumerate(sizes.tolist()), strict=True)
        )
        position = 0
        wanted = places.tolist()
        while position < len(wanted):
            number, size = starts.get(wanted[position], (-1, 1))
            picks.append(number)
            position += size
        return tuple(picks)


def _longest_run(flags: Iterable[bool]) -> int:
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest


def _roots(count: int, ties: Sequence[tuple[Labels, Labels]]) -> Labels:
    """The smallest label of each label's class: a disjoint-set forest."""
    parent = list(range(count))

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for ones, others in ties:
        for one, other in zip(ones.tolist(), others.tolist(), strict=True):
            first, second = root(one), root(other)
            if first != second:
                parent[max(first, second)] = min(first, second)
    return np.array([root(label) for label in range(count)], dtype=np.int64)
