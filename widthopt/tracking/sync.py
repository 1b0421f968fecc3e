"""Sends tracked runs to W&B that were offline, or whose server was unreachable.

It may be stopped and repeated at any time: each run is sent as far as the server lacks it.
"""

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from widthopt.tracking.files import TrackingFiles
from widthopt.tracking.secrets import error_line
from widthopt.tracking.send import SendProcess


INIT_SECONDS, FINISH_SECONDS = 60.0, 300.0
"""Time limits for the first answer of the server, and for sending one run."""

REFUSED_IN_A_ROW = 3
"""Consecutive failures after which no further run is tried: the server is at fault."""


class Sent(NamedTuple):
    """The outcome for the run in a folder of this name, and why it was refused.

    ``known``: the server had everything; ``running``: the run is left for the next time.
    """

    name: str
    state: Literal["sent", "known", "running", "refused"]
    why: str = ""


def tracked_runs(root: Path, names: Collection[str] | None = None) -> list[TrackingFiles]:
    """Return the runs below a root that W&B is to have; of these names, or all if None."""
    patterns = ("stages/*/tracking/wandb.json", "report/*/tracking/wandb.json")
    folders = sorted(path.parents[1] for pattern in patterns for path in root.glob(pattern))
    return [TrackingFiles(path) for path in folders if names is None or path.name in names]


def sync(runs: Collection[TrackingFiles], *, pause_seconds: float) -> Iterator[Sent]:
    """Send what the server lacks, one run after another, with a pause after each.

    A server may refuse a single run, such as one that was deleted there, so the next one is tried
    after a failure; after `REFUSED_IN_A_ROW` consecutive failures no further one is tried.
    """
    refused = 0
    for files in runs:
        sent = _sync_run(files)
        yield sent
        if sent.state in ("sent", "refused"):
            refused = refused + 1 if sent.state == "refused" else 0
            if refused == REFUSED_IN_A_ROW:
                return
            time.sleep(pause_seconds)


def _sync_run(files: TrackingFiles) -> Sent:
    name = files.folder.name
    try:
        lock, is_free = files.open_lock()
        if not is_free or files.is_fully_synced:
            os.close(lock)
            return Sent(name, "known" if is_free else "running")
        process = SendProcess(files, lock, "online", INIT_SECONDS, FINISH_SECONDS)
    except OSError as error:  # such as a folder of another user
        return Sent(name, "refused", error_line(error))
    why = process.finish(INIT_SECONDS + FINISH_SECONDS)
    return Sent(name, "refused" if why else "sent", why)
