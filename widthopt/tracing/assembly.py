"""From what the rules recorded to a `WidthGraph`: classes, width variables, axes."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from widthopt.tracing.labels import Channels, Labels, Ledger
from widthopt.widthgraph import (
    Axis,
    Layer,
    Norm,
    Parameter,
    Rewrite,
    Run,
    Stage,
    Variable,
    WidthGraph,
)


def assembled(ledger: Ledger, stages: tuple[Stage, ...]) -> WidthGraph:
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


class _Assembly:
    """Sorts classes into variables and writes axes as runs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._roots = _roots(ledger.count, ledger.ties)
        self._place: dict[int, tuple[int, int]] = {}  # root -> variable, class within it
        self._block: list[int] = []  # consecutive blocks of one class, by variable
        self.variables: list[Variable] = []
        self._sort()

    def _sort(self) -> None:
        """Bucket classes by the axes that contain them, reading axes included.

        Producers alone would not do: half of a layer's output may go elsewhere.
        """
        ledger, signature = self._ledger, defaultdict[int, list[tuple[int, int]]](list)
        axes = [Channels(labels) for _, labels in ledger.minted]
        for layer in ledger.layers:
            axes += [layer.reads, layer.writes]
        axes += [channels for _, _, channels in ledger.norms]
        axes += ledger.parameters.values()
        for number, channels in enumerate(axes):
            roots, counts = np.unique(self._roots[channels.labels], return_counts=True)
            for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
                signature[root].append((number, count * channels.repeat))
        fixed = {root for labels in ledger.fixed for root in self._roots[labels].tolist()}
        writers = self._writers()
        members: dict[tuple[object, ...], list[int]] = {}
        for _, labels in ledger.minted:
            for root in dict.fromkeys(self._roots[labels].tolist()):
                if root not in self._place:
                    bucket = (tuple(signature[root]), root in fixed)
                    members.setdefault(bucket, []).append(root)
                    self._place[root] = (-1, -1)
        taken: dict[str, int] = defaultdict(int)
        for (key, is_fixed), roots in members.items():  # type: ignore[misc]  # the pair above
            first = writers[roots[0]][0]
            taken[first] += 1
            name = first if taken[first] == 1 else f"{first}:{taken[first]}"
            labels = self._roots[dict(ledger.minted)[first]]
            for number, root in enumerate(roots):
                self._place[root] = (len(self.variables), number)
            unit = int((labels == roots[0]).sum())
            self._block.append(_longest_run(labels == roots[0]))
            self.variables.append(
                Variable(name, unit * len(roots), unit, not is_fixed, tuple(writers[roots[0]]))
            )
            assert key, "a class that no axis contains"

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

    def _blocks(self, channels: Channels) -> list[tuple[int, int, int, int]]:
        """Variable, class and length of each block of an axis, and its labels' count.

        The labels of one class that a grouped convolution made consecutive are one block.
        """
        roots = self._roots[channels.labels].tolist()
        blocks: list[tuple[int, int, int, int]] = []
        at = 0
        while at < len(roots):
            variable, number = self._place[roots[at]]
            size = self._block[variable]
            if roots[at : at + size] != [roots[at]] * size:
                size = 1
            blocks.append((variable, number, size * channels.repeat, size))
            at += size
        return blocks

    def axis(self, channels: Channels) -> Axis:
        """An axis as runs of consecutive classes."""
        runs: list[Run] = []
        for variable, number, repeat, _ in self._blocks(channels):
            last = runs[-1] if runs else None
            if (
                last is not None
                and (last.variable, last.repeat) == (variable, repeat)
                and last.start + last.count == number
            ):
                runs[-1] = last._replace(count=last.count + 1)
            else:
                runs.append(Run(variable, number, 1, repeat))
        return tuple(runs)

    def picks(self, reads: Channels, places: Labels) -> tuple[int, ...]:
        """Places of labels, as places of blocks."""
        picks: list[int] = []
        starts: dict[int, tuple[int, int]] = {}
        at = 0
        for number, (_, _, _, size) in enumerate(self._blocks(reads)):
            starts[at] = (number, size)
            at += size
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
