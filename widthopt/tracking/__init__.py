"""What a run writes down as it goes: JSON lines always, Weights & Biases beside them.

Results never depend on it: figures are drawn from records, and whatever goes wrong here is one
warning and no more. Only one of several processes that train together writes.
"""

import json
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from widthopt.errors import InputError
from widthopt.files import write_atomically
from widthopt.identity import key
from widthopt.tracking.about import LONGEST_TAG, About
from widthopt.tracking.client import Client, End, Kept, Where, reason
from widthopt.tracking.lines import Lines, Row
from widthopt.training import distributed


__all__ = ["About", "Row", "Tracker", "Tracking", "show_in", "show_media", "tracked"]

logger = logging.getLogger("widthopt")

WIDTHS = "widths.json"
"""Where a run's folder has the widths that were found, as they are shown."""


LONGEST_PROJECT = 128
"""Characters of a project's name at most."""


@dataclass(frozen=True, slots=True)
class Tracking:
    """How runs are tracked; ``conf/tracking`` has the choices. No part of a run's name.

    Attributes:
        mode: ``offline``: W&B's files are written beside the run, and no network is touched;
            ``online``: they are sent as they are written; ``disabled``: JSON lines alone.
        project: W&B's project.
        entity: A user or team of W&B's; the key's own if None.
        tags: More tags than a run has by itself.
        salt: Anything that makes other runs of W&B of the same work, such as of a repetition.
        every: Steps between two rows; each epoch ends with one.
        start_seconds: Time at most until W&B has answered; the work does not wait for it.
        finish_seconds: Time at most that the end of a run waits for W&B.
    """

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    tags: tuple[str, ...]
    salt: str
    every: int
    start_seconds: float
    finish_seconds: float

    def __post_init__(self) -> None:
        for name, holds, rule in (
            (
                "project",
                0 < len(self.project) <= LONGEST_PROJECT and not set(self.project) & set("/\\#?%:"),
                f"it has 1 to {LONGEST_PROJECT} characters, and none of /\\#?%:",
            ),
            ("every", self.every >= 1, "it is a number of steps; use a whole number from 1 up"),
            ("start_seconds", 0 < self.start_seconds < math.inf, "it is a number above 0"),
            ("finish_seconds", 0 < self.finish_seconds < math.inf, "it is a number above 0"),
            (
                "tags",
                all(0 < len(one) <= LONGEST_TAG for one in self.tags),
                f"a tag has 1 to {LONGEST_TAG} characters",
            ),
        ):
            if not holds:
                value = getattr(self, name)
                shown = f"[{', '.join(value)}]" if isinstance(value, tuple) else value
                raise InputError(f"tracking.{name} is {shown}, but {rule}; correct it")

    def run_id(self, name: str) -> str:
        """What W&B knows a run by: the name of its folder, and the salt if there is some."""
        return name + (f"-{key('salt', self.salt)}" if self.salt else "")

    @property
    def imports(self) -> tuple[str, ...]:
        """Modules that take long to import, for processes that tracked runs are forked from."""
        return () if self.mode == "disabled" else ("widthopt.tracking.preload",)

    @property
    def where(self) -> Where | None:
        """How W&B is reached; None where it is not."""
        if self.mode == "disabled":
            return None
        return Where(self.mode, self.project, self.entity, self.start_seconds, self.finish_seconds)


class Tracker:
    """What is written down of one run.

    It is a training's `widthopt.training.Log`. A search or a training may go on from a
    checkpoint; rows behind it are then written again.

    Attributes:
        every: Steps between two rows.
        about: What the run is.
        end: How it ends, and what it came to so far.
    """

    def __init__(self, tracking: Tracking, about: About, folder: Path) -> None:
        """Prepare; nothing is written before the first row.

        Args:
            tracking: How.
            about: What the run is.
            folder: The run's own.
        """
        self.every = tracking.every
        self.about, self._kept = about, Kept(folder)
        self._lines = Lines(self._kept.metrics)
        where = tracking.where
        self._client = None if where is None else Client(where, self._kept, about)
        self._mode, self._project = tracking.mode, tracking.project
        self._entity = tracking.entity
        self._prefix = "search" if about.kind == "search" else "train"
        self._begun, self._last, self._warned = False, -1, False
        self.end = End()

    def resume(self, step: float) -> None:
        """The training goes on after so many steps, from 0: rows behind them are void."""
        kept: list[Row] = []
        if math.isfinite(step):
            self._last = int(step)
        with self.careful():
            self._kept.folder.mkdir(parents=True, exist_ok=True)
            kept = self._lines.cut(step)
        if self._client is not None and not self._begun:
            with self.careful():
                self._kept.begin(self.about, project=self._project, entity=self._entity)
                self._client.begin(kept)
        self._begun = True

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was seen when ``step`` steps had been taken.

        Args:
            step: More than that of the row before.
            values: By name; names without a slash, but ``epoch``, are those of `metrics.BY_STEP`
                or of the search, and are written below ``search/`` or ``train/``. What is not
                finite is left out.
        """
        if not self._begun:
            self.resume(-1)
        self._last = step
        with self.careful():
            named = {
                name if "/" in name or name == "epoch" else f"{self._prefix}/{name}": (
                    value if isinstance(value, int) else float(value)
                )
                for name, value in values.items()
                if math.isfinite(value)
            }
            row = {"step": step, "time": round(time.time(), 3), **named}
            if self._client is not None:
                self._client.row(row)
            self._lines.add(row)

    def rows(self, table: Sequence[Mapping[str, float]]) -> None:
        """Write a table behind all steps, one row each."""
        for values in table:
            self.row(self._last + 1, values)

    def keep(self) -> None:
        """See that what was written lasts; called before a checkpoint says that it is done."""
        with self.careful():
            self._lines.keep()

    def summary(self, values: Mapping[str, Any]) -> None:
        """What the run came to, by name: numbers, texts and lists."""
        self.end.summary |= {name: one for name, one in values.items() if _showable(one)}

    def widths(
        self, channels: Mapping[str, float], multipliers: Mapping[str, float], **others: Any
    ) -> None:
        """The widths that were found: rows by layer, a list, a file, and the file as artifact.

        Args:
            channels: By width variable, in forward order; of a search as it expects them.
            multipliers: The same as parts of the un-enlarged network's.
            others: What else belongs into the file, as plain data.
        """
        content = {"channels": dict(channels), "multipliers": dict(multipliers), **others}
        whose = "search" if self.about.kind == "search" else self.about.network
        self.rows(
            [
                {
                    "layer/index": index,
                    f"layers/{whose}/channels": channels[name],
                    f"layers/{whose}/multiplier": multipliers[name],
                }
                for index, name in enumerate(channels)
            ]
        )
        self.summary(
            {"widths/variables": list(channels), "widths/channels": list(channels.values())}
        )
        with self.careful():
            write_atomically(self._kept.folder / WIDTHS, json.dumps(content, indent=2) + "\n")
            self.end.widths = WIDTHS

    def close(self) -> None:
        """Write the end; waits for W&B no longer than it may."""
        if not self._begun:  # it ended before it came to its training: that will go on
            self.resume(math.inf)
        with self.careful():
            self._lines.close()
        with self.careful():  # what was tracked before and goes on untracked ends, too
            if self._client is not None or self._kept.about is not None:
                self._kept.end(self.end)
        if self._client is not None:
            wrong = ""
            with self.careful():
                wrong = self._client.end(self.end, hurry=self.end.preempted)
            if wrong:
                self._warn(
                    f"tracking={self._mode} went wrong ({wrong}); the run itself is well, and "
                    f"{self._kept.metrics} has its rows: `widthopt sync` sends them later"
                )

    @contextmanager
    def careful(self) -> Iterator[None]:
        """Turn whatever goes wrong as something is written or shown into one warning."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (nothing that is written may hurt the work)
            self._warn(f"{self._kept.metrics} cannot be written ({reason(error)}); the run goes on")

    def _warn(self, text: str) -> None:
        """Say it, unless something was said before."""
        level = logging.DEBUG if self._warned else logging.WARNING
        logger.log(level, "%s", text)
        self._warned = True


def _showable(value: Any) -> bool:
    """Whether a summary can show it: W&B drops what is no number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool | int | str | list)


@contextmanager
def tracked(
    tracking: Tracking,
    about: About,
    folder: Path,
    *,
    interruptions: tuple[type[Exception], ...] = (),
) -> Iterator[Tracker | None]:
    """Track what happens in the block; None in all processes but the first.

    Args:
        tracking: How.
        about: What it is.
        folder: Its own.
        interruptions: What the block raises when it was interrupted and will go on.
    """
    if distributed.rank() != 0:
        yield None
        return
    tracker = Tracker(tracking, about, folder)
    try:
        yield tracker
    except BaseException as error:
        tracker.end.code = 1
        if isinstance(error, (*interruptions, KeyboardInterrupt, SystemExit)):
            tracker.end.preempted = True
        else:
            tracker.end.why = f"{type(error).__name__}: {reason(error)}"
        raise
    finally:
        tracker.close()


def show_in(figures: Collection[str], folder: Path) -> None:
    """See that a run that is done is found by these figures too, if it is tracked.

    It may have been done for another sweep, before. A server hears of it with the next sync.

    Args:
        figures: Their names.
        folder: The run's.
    """
    kept = Kept(folder)
    about = kept.about
    if about is None or set(figures) <= set(about.figures):
        return
    try:
        with kept.alone(wait=False) as free:
            if free and kept.ended is not None and not kept.ended.code:
                kept.show_in([one for one in figures if one not in about.figures])
    except (OSError, InputError) as error:  # such as somebody else's folder
        logger.warning("%s is not shown by %s (%s)", folder, ", ".join(figures), reason(error))


def show_media(tracking: Tracking, about: About, folder: Path, files: Mapping[str, str]) -> None:
    """Track pictures (PNG) and tables (CSV) as a run of their own, unless a server has just these.

    Args:
        tracking: How.
        about: What it is.
        folder: Its own.
        files: Their paths, relative to the folder, by name.
    """
    kept = Kept(folder)
    if kept.whole and kept.ended is not None and kept.ended.media == dict(files):
        return
    with tracked(tracking, about, folder) as tracker:
        if tracker is not None:
            tracker.end.media = dict(files)
