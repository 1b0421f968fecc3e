"""Experiment tracking: logs runs to JSON lines and to Weights & Biases (W&B).

Results do not depend on tracking: figures are drawn from records, and a failure here is one
warning. Only rank 0 logs.
"""

import json
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from widthopt.errors import InputError
from widthopt.files import write_atomically
from widthopt.identity import key
from widthopt.tracking.about import LONGEST_TAG, About
from widthopt.tracking.files import End, TrackingFiles
from widthopt.tracking.secrets import error_line
from widthopt.tracking.send import SendProcess


__all__ = ["About", "Tracker", "Tracking", "log_media", "open_tracker"]

logger = logging.getLogger("widthopt")

LONGEST_PROJECT = 128
"""Largest length of a project name that W&B accepts."""

HURRY_SECONDS = 10.0
"""Time limit for W&B at the end of a run whose job is being preempted."""


@dataclass(frozen=True, slots=True)
class Tracking:
    """The keys of ``conf/tracking``, documented there. They are not part of a run's identity."""

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    tags: tuple[str, ...]
    salt: str
    log_every_steps: int
    init_timeout_seconds: float
    finish_seconds: float

    def __post_init__(self) -> None:
        is_project = re.fullmatch(rf"[^/\\#?%:]{{1,{LONGEST_PROJECT}}}", self.project) is not None
        are_tags = all(0 < len(tag) <= LONGEST_TAG for tag in self.tags)
        characters = f"has 1 to {LONGEST_PROJECT} characters, and none of /\\#?%:"
        above_0 = "it must be a finite number above 0"
        for name, is_valid, rule in (
            ("project", is_project, f"a project {characters}"),
            ("log_every_steps", self.log_every_steps >= 1, "it must be an integer of at least 1"),
            ("init_timeout_seconds", 0 < self.init_timeout_seconds < math.inf, above_0),
            ("finish_seconds", 0 < self.finish_seconds < math.inf, above_0),
            ("tags", are_tags, f"a tag has 1 to {LONGEST_TAG} characters"),
        ):
            if not is_valid:
                value = getattr(self, name)
                shown = f"[{', '.join(value)}]" if isinstance(value, tuple) else value
                raise InputError(f"tracking.{name} is {shown}, but {rule}; correct it")

    def run_id(self, name: str) -> str:
        """Return the W&B id of the run in a folder of this name."""
        return name + (f"-{key('salt', self.salt)}" if self.salt else "")


class Tracker:
    """Logs one run; implements `widthopt.training.Log`.

    Attributes:
        every: Steps between two rows.
        about: The description of the run.
        end: The outcome of the run, with its results so far.
    """

    def __init__(self, tracking: Tracking, about: About, folder: Path) -> None:
        """Prepare to log to the folder of the run; nothing is written before the first row."""
        self.every, self.about, self.end = tracking.log_every_steps, about, End()
        self._tracking, self._files = tracking, TrackingFiles(folder)
        self._process: SendProcess | None = None
        self._prefix = "search" if about.kind == "search" else "train"
        self._has_begun, self._has_warned, self._last = False, False, -1

    def resume(self, step: float) -> None:
        """Resume after a step: later rows are removed; infinity keeps all rows."""
        tracking = self._tracking
        if math.isfinite(step):
            self._last = int(step)
        with self.best_effort():
            self._files.cut(step)
        if tracking.mode != "disabled" and not self._has_begun:
            with self.best_effort():
                place = {"project": tracking.project, "entity": tracking.entity}
                self._files.begin({**self.about.init, **place})
                lock, _ = self._files.open_lock()  # the process waits for a sync that holds it
                limits = (tracking.init_timeout_seconds, tracking.finish_seconds)
                self._process = SendProcess(self._files, lock, tracking.mode, *limits)
        self._has_begun = True

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step.

        Args:
            step: Number of steps done; larger than in the previous row.
            values: Numbers by name. Names without a slash, except ``epoch``, are put below
                ``search/`` or ``train/``. Values that are not finite are left out.
        """
        if not self._has_begun:
            self.resume(-1)
        self._last = step
        with self.best_effort():
            row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
            for name, value in values.items():
                if math.isfinite(value):
                    has_prefix = "/" in name or name == "epoch"
                    number = value if isinstance(value, int) else float(value)
                    row[name if has_prefix else f"{self._prefix}/{name}"] = number
            self._files.append(row)

    def rows(self, table: Sequence[Mapping[str, float]]) -> None:
        """Log the rows of a table, each at a new step after the last one."""
        for values in table:
            self.row(self._last + 1, values)

    def keep(self) -> None:
        """Flush all rows to the disk; called before a checkpoint is written."""
        with self.best_effort():
            self._files.append(durable=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add results by name: finite numbers, strings and lists. Other values are ignored."""
        for name, value in values.items():
            is_finite = isinstance(value, float) and math.isfinite(value)
            if is_finite or isinstance(value, bool | int | str | list):
                self.end.summary[name] = value

    def widths(
        self, channels: Mapping[str, float], multipliers: Mapping[str, float], **extra: Any
    ) -> None:
        """Log the widths: rows by layer, lists in the summary, and a file that becomes an artifact.

        Args:
            channels: Channels by width variable, in forward order; for a search the expected
                channels.
            multipliers: Multipliers by width variable, relative to the network without
                enlargement.
            extra: Further content of the file, as plain data.
        """
        layers = f"layers/{'search' if self.about.kind == 'search' else self.about.network}"
        for index, (name, count) in enumerate(channels.items()):
            values = {f"{layers}/channels": count, f"{layers}/multiplier": multipliers[name]}
            self.rows([{"layer/index": index, **values}])
        names, counts = list(channels), list(channels.values())
        self.summary({"widths/variables": names, "widths/channels": counts})
        content = {"channels": dict(channels), "multipliers": dict(multipliers), **extra}
        with self.best_effort():
            write_atomically(self._files.widths, json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        """Write the outcome, and wait for W&B for a limited time."""
        if not self._has_begun:  # the block ended before the training began: keep earlier rows
            self.resume(math.inf)
        self.keep()
        with self.best_effort():
            if self._files.init is not None:  # also if only an earlier attempt was tracked
                self._files.write_end(self.end)
        if self._process is not None:
            seconds = self._tracking.finish_seconds
            seconds = min(seconds, HURRY_SECONDS) if self.end.preempted else seconds
            if reason := self._process.finish(seconds):
                self._warn(
                    f"tracking={self._tracking.mode} failed ({reason}); the run is not affected, "
                    f"and {self._files.metrics} has its rows; `widthopt sync` sends them later"
                )

    @contextmanager
    def best_effort(self) -> Iterator[None]:
        """Turn an exception in the block into a warning."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (tracking must not stop a run)
            reason = error_line(error)
            self._warn(f"{self._files.metrics} cannot be written ({reason}); the run continues")

    def _warn(self, message: str) -> None:
        """Log the first problem of a run at level WARNING, and further ones at level DEBUG."""
        logger.log(logging.DEBUG if self._has_warned else logging.WARNING, "%s", message)
        self._has_warned = True


@contextmanager
def open_tracker(
    tracking: Tracking, about: About, folder: Path, *, interruptions: Iterable[type[Exception]] = ()
) -> Iterator[Tracker | None]:
    """Track the block as a run in a folder; yields None on all ranks except 0.

    An exception of a type in ``interruptions`` means that the run will be resumed later.
    """
    from widthopt.training import distributed  # noqa: PLC0415 (imports torch, which sending does not need)

    if distributed.rank() != 0:
        yield None
        return
    tracker = Tracker(tracking, about, folder)
    try:
        yield tracker
    except BaseException as error:
        tracker.end.code = 1
        tracker.end.preempted = isinstance(error, (*interruptions, KeyboardInterrupt, SystemExit))
        if not tracker.end.preempted:
            tracker.end.why = f"{type(error).__name__}: {error_line(error)}"
        raise
    finally:
        tracker.close()


def log_media(tracking: Tracking, about: About, folder: Path, media: Mapping[str, str]) -> None:
    """Track pictures and tables (paths by name), unless a server already has them."""
    files = TrackingFiles(folder)
    if files.is_fully_synced and files.end is not None and files.end.media == dict(media):
        return
    with open_tracker(tracking, about, folder) as tracker:
        if tracker is not None:
            tracker.end.media = dict(media)
