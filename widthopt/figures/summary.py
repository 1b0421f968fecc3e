"""The table at the end of a run: what each method found, cost and reached."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from widthopt.records import Record, Summary, by_method


def table(records: Sequence[Record]) -> Table:
    """One row for each method, with means over seeds; fits a terminal of 80 columns.

    ``channels`` are the least and the most of the first seed. ``overhead`` is in
    MACs as counted, ``nominal`` the idealised law's saving factor; ``saved`` is relative to a
    search on the target itself. Seconds are those of search and final training.
    """
    first = records[0]
    seeds = len({record.found.seed for record in records})
    result = Table(
        title=f"{first.network} on {first.dataset}, {seeds} seed{'s' if seeds > 1 else ''}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    result.add_column("method", no_wrap=True)
    result.add_column("channels", no_wrap=True)
    for name in ("MACs", "params", "overhead", "nominal", "saved", "top-1 %", "seconds"):
        result.add_column(name, justify="right", no_wrap=True)
    for method, ones in by_method(records).items():
        found = [one.found for one in ones]
        searched = method != "uniform"
        search = Summary.of(one.search_seconds for one in found).mean
        train = Summary.of(one.train_seconds for one in ones).mean
        result.add_row(
            method,
            channels(ones[0]),
            short(Summary.of(one.macs for one in found).mean),
            short(Summary.of(one.parameters for one in found).mean),
            short(Summary.of(one.overhead_macs for one in found).mean) if searched else "-",
            f"{found[0].nominal_saving:.3g}x" if searched else "-",
            f"{100 * Summary.of(one.saved for one in found).mean:.1f}%" if searched else "-",
            str(Summary.of(one.top1 for one in ones)),
            f"{search:.0f}+{train:.0f}",
        )
    return result


def channels(record: Record) -> str:
    """The least and the most channels of a record."""
    counts = record.found.channels.values()
    return f"{min(counts)}-{max(counts)}"


def short(count: float) -> str:
    """A count with a unit prefix: 1.81G."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{prefix}"
    return f"{count:.0f}"
