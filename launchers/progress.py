"""How far a sweep is: on a terminal one line that changes, elsewhere one line for each run."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from hydra_plugins.widthopt_launchers.workload import Task


logger = logging.getLogger("widthopt")

RECENT = 20
"""Items that are done by which the rest is foretold."""


class Progress:
    """Counts what is done, running and failed, and foretells how long the rest takes.

    Attributes:
        done: Items that are done.
        failed: Items that failed.
        blocked: Items that cannot be done, since what they need failed.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Args: tasks: All that is to be done."""
        self.done = self.failed = self.blocked = 0
        self._all = len(tasks)
        self._running: dict[str, float] = {}
        self._at_once = 1
        self._weight_left = sum(task.weight for task in tasks)
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # weights and seconds
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal and tasks:
            text = TextColumn("{task.description}", markup=False)
            self._bar = Bar(BarColumn(), text, console=console, refresh_per_second=2)
            self._task = self._bar.add_task(self._text(), total=self._all)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, task: Task) -> None:
        """A task has been started."""
        self._running[task.name] = time.monotonic()
        self._at_once = max(self._at_once, len(self._running))
        self._show()

    def finish(self, task: Task) -> None:
        """A task is done."""
        self.done += 1
        self._recent.append((task.weight, time.monotonic() - self._running[task.name]))
        self._end(task, "done")

    def fail(self, task: Task, why: str) -> None:
        """A task failed.

        Args:
            task: The task.
            why: What went wrong, in one line.
        """
        self.failed += 1
        self._end(task, f"FAILED ({why})")

    def wait_for_ever(self, task: Task) -> None:
        """A task cannot be done, since what it needs failed."""
        self.blocked += 1
        self._weight_left -= task.weight
        self._show()

    def tick(self) -> None:
        """Some time has passed."""
        self._show()

    def _end(self, task: Task, how: str) -> None:
        started = self._running.pop(task.name)
        self._weight_left -= task.weight
        seconds = time.monotonic() - started
        level = logging.INFO if self._bar is None or how != "done" else logging.DEBUG
        logger.log(level, "%s; %s: %s, %.1f s", self._text(), how, task.what, seconds)
        self._show()

    def _show(self) -> None:
        if self._bar:
            ended = self.done + self.failed + self.blocked
            self._bar.update(self._task, completed=ended, description=self._text())

    def _text(self) -> str:
        """In one line: counts, and the time left."""
        words = [f"{self.done} of {self._all} done"]
        words += [f"{len(self._running)} running"] if self._running else []
        words += [f"{self.failed} failed"] if self.failed else []
        words += [f"{self.blocked} blocked"] if self.blocked else []
        if self._recent:
            left = round(self._seconds_left())
            words.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return ", ".join(words)

    def _seconds_left(self) -> float:
        """What the rest takes as tasks took of late: by their weights or their number.

        The larger of the two, since small tasks take their time to start and not their weight's.
        """
        weight = sum(weight for weight, _ in self._recent)
        seconds = sum(seconds for _, seconds in self._recent)
        each = seconds / len(self._recent)
        number = self._all - self.done - self.failed - self.blocked
        left = max(number * each, self._weight_left * seconds / weight if weight else 0.0)
        now = time.monotonic()
        gone = sum(min(now - started, each) for started in self._running.values())
        return max(left - gone, 0.0) / self._at_once
