"""Average optimised channels of each width variable: the paper's figure A1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from widthopt.records import Record, Summary
from widthopt.reporting.figures.grid import TextTable
from widthopt.reporting.figures.groups import Group, clash_notes, panels
from widthopt.reporting.figures.style import COLOURS, PRINTED_INCHES, RC, SERIES, SMALL


MOST_NAMES = 44
"""Number of tick labels that fit below one panel. With more variables some labels are omitted."""


@dataclass(frozen=True, slots=True)
class AverageWidths:
    """Figure A1: the channels of each width variable, averaged over all searches.

    Attributes:
        name: The stem of the file names.
        title: The title of the figure.
        panels: The paper's label of the panel of each network.
        paper_last: Channels of the last layer in the paper, by network.
        last: The width variable of the last layer, by network. The default is the last variable
            in forward order. A residual stream is named after its first layer, so the last layer
            of ResNet18 belongs to ``layer4.0.conv2``.
        claim: The claim of the paper, in one sentence.

    Source: paper section 4.1 and appendix B.
    """

    name: str
    title: str
    panels: Mapping[str, str]
    paper_last: Mapping[str, float]
    last: Mapping[str, str] = field(default_factory=dict)
    claim: str = ""

    def draw(self, records: Sequence[Record]) -> dict[str, Figure]:
        """Draw one panel for each network: mean channels, and one standard deviation as a shade.

        The vertical axis is logarithmic, since widths within a network differ more than tenfold.
        """
        shown = panels(records, self.panels)
        with mpl.rc_context(RC):
            height = 0.4 + 3.3 * max(1, len(shown))
            figure = Figure(figsize=(PRINTED_INCHES, height), layout="constrained")
            figure.suptitle(self.title)
            cells = figure.subplots(max(1, len(shown)), 1, squeeze=False).flat
            for axes, (network, title, group) in zip(cells, shown, strict=False):
                axes.set_title(title, loc="left", fontsize=9)
                if group is None or not group.searched:
                    axes.text(0.5, 0.5, "no records yet", ha="center", transform=axes.transAxes)
                    axes.set(xticks=[], yticks=[])
                    continue
                self._panel(axes, network, group)
        return {self.name: figure}

    def _panel(self, axes: Axes, network: str, group: Group) -> None:
        uniform, counts = _uniform(group), _counts(group)
        places = range(len(counts))
        means = [count.mean for count in counts.values()]
        low = [max(1.0, count.mean - count.std) for count in counts.values()]
        high = [count.mean + count.std for count in counts.values()]
        colour = SERIES[0]
        axes.plot(
            places, list(uniform.values()), color=COLOURS["uniform"], linestyle="--", linewidth=1.2,
            label="uniform (not optimised)",
        )  # fmt: skip
        seen = len(group.searched)
        axes.plot(
            places, means, color=colour, marker="o", markersize=4, linewidth=1.5,
            label=f"mean of {seen} optimised width{'s' if seen > 1 else ''}",
        )  # fmt: skip
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        paper, last = self.paper_last.get(network), self._last(network, counts)
        if paper is not None and last is not None:
            axes.plot(
                [list(counts).index(last)], [paper], color=SERIES[1], marker="*", markersize=9,
                linestyle="none", label=f"last layer in the paper: {paper:g}",
            )  # fmt: skip
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        step = -(-len(counts) // MOST_NAMES)
        axes.set_xticks(list(places)[::step], list(counts)[::step], rotation=90, fontsize=SMALL)
        axes.set_xlim(-0.5, len(counts) - 0.5)
        axes.set(xlabel="width variable, in forward order", ylabel="channels")
        axes.legend(loc="upper left", fontsize=SMALL)

    def table(self, records: Sequence[Record]) -> TextTable:
        """Return a row for each width variable; notes compare the last layer with the paper."""
        shown = panels(records, self.panels)
        rows: list[tuple[str, ...]] = []
        notes = [self.claim] if self.claim else []
        for network, title, group in shown:
            name = title.removeprefix(f"({self.panels[network]}) ")
            paper = self.paper_last.get(network)
            message = "" if paper is None else f"; {paper:g} in the paper"
            if group is None or not group.searched:
                notes.append(
                    f"{name}: no records yet{message and message + ' for the last layer'}."
                )
                continue
            uniform, counts = _uniform(group), _counts(group)
            rows += [
                (name, variable, f"{uniform[variable]:g}", f"{count.mean:.1f}", _std(count))
                for variable, count in counts.items()
            ]
            last = self._last(network, counts)
            if last is not None:
                notes.append(
                    f"{name}: the last layer, `{last}`, has {counts[last].mean:.0f} channels on "
                    f"average over {len(group.searched)} optimised widths{message}; "
                    f"{uniform[last]:g} in the baseline."
                )
        columns = ("network", "width variable", "uniform", "mean", "std")
        return TextTable(self.title, columns, tuple(rows), (*notes, *clash_notes(shown)))

    def _last(self, network: str, counts: Mapping[str, Summary]) -> str | None:
        """Return the width variable of the last layer, or None if the records do not have it."""
        name = self.last.get(network, list(counts)[-1])
        return name if name in counts else None


def _counts(group: Group) -> dict[str, Summary]:
    """Return the channels of each variable over all searches; each search counts once."""
    return {
        name: Summary.of(record.found.channels[name] for record in group.searched)
        for name in group.searched[0].found.channels
    }


def _uniform(group: Group) -> dict[str, float]:
    """Return the channels of the baseline; without its records, those that multipliers refer to."""
    if group.uniform:
        return dict(group.uniform[0].found.channels)
    found = group.searched[0].found
    return {name: round(count / found.multipliers[name]) for name, count in found.channels.items()}


def _std(count: Summary) -> str:
    return f"{count.std:.1f}" if count.seeds > 1 else "-"
