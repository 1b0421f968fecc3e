"""The table at the end of a run: what each method found, cost and reached."""

from collections.abc import Sequence

from rich.table import Table

from widthopt.records import Record, Summary, by_method


def table(records: Sequence[Record]) -> Table:
    """One row for each method, with means over seeds.

    ``overhead`` is in MACs as counted, ``nominal`` the idealised law's saving factor; ``saved``
    is relative to a search on the target itself. Seconds are of search and final training.
    """
    first = records[0]
    seeds = len({record.found.seed for record in records})
    result = Table(
        title=f"{first.network} on {first.dataset}, {seeds} seed{'s' if seeds > 1 else ''}",
        title_justify="left",
    )
    result.add_column("method")
    result.add_column("channels: least-most, last")
    for name in ("MACs", "parameters", "overhead", "nominal", "saved", "top-1 %", "seconds"):
        result.add_column(name, justify="right")
    for method, ones in by_method(records).items():
        found = [one.found for one in ones]
        searched = method != "uniform"
        search = Summary.of(one.search_seconds for one in found).mean
        train = Summary.of(one.train_seconds for one in ones).mean
        result.add_row(
            method,
            channels(ones[0]) if len(ones) == 1 else f"{channels(ones[0])} (seed {found[0].seed})",
            short(Summary.of(one.macs for one in found).mean),
            short(Summary.of(one.parameters for one in found).mean),
            short(Summary.of(one.overhead_macs for one in found).mean) if searched else "-",
            f"{found[0].nominal_saving:.3g}x" if searched else "-",
            f"{100 * Summary.of(one.saved for one in found).mean:.1f} %" if searched else "-",
            str(Summary.of(one.top1 for one in ones)),
            f"{search:.0f} + {train:.0f}",
        )
    return result


def channels(record: Record) -> str:
    """The channel counts of a record in a few words."""
    counts = list(record.found.channels.values())
    return f"{min(counts)}-{max(counts)}, {counts[-1]}"


def short(count: float) -> str:
    """A count with a unit prefix: 1.81 G."""
    for size, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{prefix}"
    return f"{count:.0f}"
