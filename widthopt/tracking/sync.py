"""Sending to W&B what was tracked offline, or what a server did not take: from a login node.

Runs are told again from what is kept of them, each as far as the server lacks it. So it may be
done at any time, as often as one likes, and stopped; what runs at the moment is left alone.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from widthopt.tracking import lines
from widthopt.tracking.client import Client, End, Kept, Where, reason


WAITS = (5.0, 20.0, 60.0)
"""Seconds before a run that a server did not take is tried again."""

REFUSED_IN_A_ROW = 3
"""Runs that are not taken, one after another, after which no further one is tried."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of one run.

    Attributes:
        name: The name of its folder.
        state: ``sent``; ``known``: a server had it; ``running``: its time has not come;
            ``refused``: it was not taken.
        why: What went wrong; empty where nothing did.
    """

    name: str
    state: str
    why: str = ""


def tracked(root: Path) -> list[Kept]:
    """All runs below a root that W&B is to know of, by name."""
    folders = [
        path.parents[1]
        for pattern in ("stages/*/tracking/run.json", "report/*/tracking/run.json")
        for path in root.glob(pattern)
    ]
    return [Kept(folder) for folder in sorted(folders)]


def sync(
    root: Path,
    *,
    names: Collection[str] | None = None,
    pause_seconds: float = 0.5,
    wait: Callable[[float], None] = time.sleep,
    finish_seconds: float = 300.0,
) -> Iterator[Sent]:
    """Send what a server lacks, one run after another.

    A run that is not taken is tried again after a while, if the one before was taken. Then it is
    the next one's turn, since a server may refuse a single run, such as one that was deleted
    there. After three in a row no further one is tried.

    Args:
        root: The folder that runs are kept in.
        names: Names of runs; all of them if None.
        pause_seconds: Time between two runs, for the server's sake.
        wait: Waits for so many seconds.
        finish_seconds: Time at most for one run.
    """
    tried, refused = False, 0
    for kept in tracked(root):
        name = kept.folder.name
        if names is not None and name not in names:
            continue
        try:
            with kept.alone(wait=False) as free:
                state = "running" if not free else "known" if kept.whole else ""
        except OSError as error:  # somebody else's
            yield Sent(name, "refused", reason(error))
            continue
        if state:
            yield Sent(name, state)
            continue
        if tried:
            wait(pause_seconds)
        why = _tell(kept, finish_seconds)
        for seconds in WAITS if tried and not refused else ():
            if not why:
                break
            wait(seconds)
            why = _tell(kept, finish_seconds)
        yield Sent(name, "refused" if why else "sent", why)
        tried, refused = True, refused + 1 if why else 0
        if refused == REFUSED_IN_A_ROW:
            return


def _tell(kept: Kept, finish_seconds: float) -> str:
    """Tell W&B all of a run that it lacks; what went wrong, or nothing.

    A run whose process was killed is told as interrupted: its work may go on.
    """
    about, (project, entity) = kept.about, kept.home
    assert about is not None
    where = Where("online", project, entity, start_seconds=60.0, finish_seconds=finish_seconds)
    client = Client(where, kept, about)
    client.begin(lines.rows(kept.metrics))
    return client.end(kept.ended or End(code=1, preempted=True), hurry=False)
