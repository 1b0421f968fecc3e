"""Which records belong together in a panel, a series and a point of the paper's figures.

A *source* is the setting that was searched, as its values on the axis that a figure is about; a
*series* is one line of a panel: an algorithm, or a strategy of extrapolation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from widthopt.records import Record


Axis = Literal["width", "depth", "resolution", "fraction", "compound"]
By = Literal["algorithm", "extrapolation"]
Source = tuple[float, ...]

AXES = ("width", "depth", "resolution", "fraction")
"""What a setting consists of, in the paper's order."""


@dataclass(frozen=True, slots=True)
class Group:
    """Records of one network, data set and target: what a panel shows.

    Attributes:
        dataset: The data set's name.
        target: The target's values.
        uniform: The records of the baseline, one for each seed.
        searched: The records of searches, one for each point and seed.
        clashes: Number of records left out because another record has the same point and seed.
    """

    dataset: str
    target: Mapping[str, float]
    uniform: list[Record]
    searched: list[Record]
    clashes: int

    def series(self, axis: Axis, by: By) -> dict[str, dict[Source, list[Record]]]:
        """Records by series and source, in the order of their names and from the target down.

        What needed no extrapolation belongs to each strategy of its algorithm. Strategies are
        never mixed in a series: where an algorithm has several, each is a series of its own.
        """
        result = {}
        algorithms = sorted({record.algorithm for record in self.searched})
        for algorithm in algorithms:
            group = [record for record in self.searched if record.algorithm == algorithm]
            strategies = sorted({record.extrapolation for record in group} - {""})
            for strategy in strategies or [""]:
                if by == "algorithm":
                    name = f"{algorithm}, {strategy}" if len(strategies) > 1 else algorithm
                else:
                    name = strategy or "same depth"
                    name = f"{algorithm}, {name}" if len(algorithms) > 1 else name
                records = [r for r in group if r.extrapolation in {"", strategy}]
                points = sorted({source_of(record, axis) for record in records}, reverse=True)
                result[name] = {
                    point: [record for record in records if source_of(record, axis) == point]
                    for point in points
                }
        return result

    def direct(self, axis: Axis) -> Source:
        """The source that is the target."""
        return _values(self.target, axis)


def is_direct(record: Record) -> bool:
    """Whether the target itself was searched."""
    return record.found.method == "direct" or not _differing(record)


def source_of(record: Record, axis: Axis) -> Source:
    """The searched setting's values on an axis; all four for the compound projection."""
    return _values(record.target if is_direct(record) else record.proxy, axis)


def source_words(source: Source, axis: Axis) -> str:
    """A source as a reader sees it: ``0.312``, ``5%`` or ``0.312, 1, 64, 5%``."""
    names = AXES if axis == "compound" else (axis,)
    words = [
        f"{100 * value:g}%" if name == "fraction" else f"{value:g}"
        for name, value in zip(names, source, strict=True)
    ]
    return ", ".join(words)


def groups(records: Sequence[Record], *, network: str, axis: Axis | None = None) -> list[Group]:
    """The panels of a network, by data set and target in the order they come.

    Where the records are of several figures, only what was projected along the axis is kept, and
    only targets that something was transferred to; until there is such a one, all targets.

    Args:
        records: Of any networks, in any order, with repetitions.
        network: The network's name.
        axis: What the figure is about; None keeps every search.
    """
    found = _by_target(records, network)
    wanted = [group for group in found if any(_is_about(record, axis) for record in group)]
    searched = [group for group in found if any(_is_searched(record) for record in group)]
    result = [_group(items, axis) for items in wanted or searched or found]
    return [group for group in result if group.uniform or group.searched]


def direct_groups(records: Sequence[Record], *, network: str) -> list[Group]:
    """Return the records of every target of a network: the baseline and direct searches."""
    kept = [record for record in records if is_direct(record) or not _is_searched(record)]
    return [_group(items, None) for items in _by_target(kept, network)]


def _by_target(records: Sequence[Record], network: str) -> list[list[Record]]:
    """A network's records by data set and target, in the order they come."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.network == network:
            key = (record.dataset, *sorted(record.target.items()))
            found.setdefault(key, []).append(record)
    return list(found.values())


def _group(records: Sequence[Record], axis: Axis | None) -> Group:
    uniform: dict[tuple[object, ...], Record] = {}
    searched: dict[tuple[object, ...], Record] = {}
    clashes = 0
    for record in records:
        if _is_searched(record):
            if axis in AXES and _differing(record) - {axis} and not is_direct(record):
                continue
            source = source_of(record, "compound")
            key = (record.algorithm, record.extrapolation, source, record.found.seed)
            first = searched.setdefault(key, record)
        else:
            first = uniform.setdefault((record.found.seed,), record)
        clashes += (record.top1, record.found.channels) != (first.top1, first.found.channels)
    first = records[0]
    return Group(
        first.dataset, first.target, list(uniform.values()), list(searched.values()), clashes
    )


def _is_searched(record: Record) -> bool:
    return record.found.method != "uniform"


def _is_about(record: Record, axis: Axis | None) -> bool:
    """Whether a record says that its target belongs to a figure about an axis."""
    if axis is None or not _is_searched(record):
        return _is_searched(record)
    if is_direct(record):
        return False
    return len(_differing(record)) > 1 if axis == "compound" else _differing(record) == {axis}


def _differing(record: Record) -> set[str]:
    return {name for name, value in record.target.items() if record.proxy[name] != value}


def _values(setting: Mapping[str, float], axis: Axis) -> Source:
    return tuple(setting[name] for name in (AXES if axis == "compound" else (axis,)))


def panel_title(label: str, network: str, group: Group | None, *, alone: bool) -> str:
    """``(3a) resnet18``, and with several groups of a network the data set and target too."""
    name = f"({label}) {network}" if label else network
    if group is None or alone:
        return name
    target = source_words(_values(group.target, "compound"), "compound")
    return f"{name}, {group.dataset}, target {target}"


def panels(
    records: Sequence[Record], labels: Mapping[str, str], axis: Axis | None = None
) -> list[tuple[str, str, Group | None]]:
    """Network, title and group of each panel; no group where a network has no records yet."""
    result: list[tuple[str, str, Group | None]] = []
    for network, label in labels.items():
        found: Sequence[Group | None] = groups(records, network=network, axis=axis) or [None]
        alone = len(found) == 1
        result += [
            (network, panel_title(label, network, item, alone=alone), item) for item in found
        ]
    return result


def clash_notes(shown: Sequence[tuple[str, str, Group | None]]) -> list[str]:
    """A sentence for each panel that left records out."""
    return [
        f"{title}: records that repeat a point and seed with another result: {group.clashes}; "
        "the first is shown."
        for _, title, group in shown
        if group and group.clashes
    ]
