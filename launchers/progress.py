"""Progress of a sweep: a progress bar on a terminal, elsewhere one line for each run."""

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
"""Finished tasks from which the remaining time is estimated."""


class Progress:
    """Count finished, running and failed tasks, and estimate the remaining time.

    Attributes:
        done: Number of finished tasks.
        failed: Number of failed tasks.
        blocked: Number of tasks that cannot start because a task they need failed.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Args: tasks: All tasks that are not done."""
        self.done = self.failed = self.blocked = 0
        self._total = len(tasks)
        self._running: dict[str, float] = {}
        self._at_once = 1
        self._weight_left = sum(task.weight for task in tasks)
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # weights and seconds
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal and tasks:
            text = TextColumn("{task.description}", markup=False)
            self._bar = Bar(BarColumn(), text, console=console, refresh_per_second=2)
            self._task = self._bar.add_task(self._text(), total=self._total)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, task: Task) -> None:
        """Record that a task has started."""
        self._running[task.name] = time.monotonic()
        self._at_once = max(self._at_once, len(self._running))
        self._show()

    def finish(self, task: Task) -> None:
        """Record that a task is done."""
        self.done += 1
        self._recent.append((task.weight, time.monotonic() - self._running[task.name]))
        self._end(task, "done")

    def fail(self, task: Task, reason: str) -> None:
        """Record that a task failed.

        Args:
            task: The task.
            reason: What went wrong, in one line.
        """
        self.failed += 1
        self._end(task, f"FAILED ({reason})")

    def block(self, task: Task) -> None:
        """Record that a task cannot start because a task that it needs failed."""
        self.blocked += 1
        self._weight_left -= task.weight
        self._show()

    def tick(self) -> None:
        """Update the display; called regularly."""
        self._show()

    def _end(self, task: Task, outcome: str) -> None:
        started = self._running.pop(task.name)
        self._weight_left -= task.weight
        seconds = time.monotonic() - started
        level = logging.INFO if self._bar is None or outcome != "done" else logging.DEBUG
        logger.log(level, "%s; %s: %s, %.1f s", self._text(), outcome, task.what, seconds)
        self._show()

    def _show(self) -> None:
        if self._bar:
            ended = self.done + self.failed + self.blocked
            self._bar.update(self._task, completed=ended, description=self._text())

    def _text(self) -> str:
        """Return the counts and the remaining time in one line."""
        parts = [f"{self.done} of {self._total} done"]
        parts += [f"{len(self._running)} running"] if self._running else []
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.blocked} blocked"] if self.blocked else []
        if self._recent:
            left = round(self._seconds_left())
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return ", ".join(parts)

    def _seconds_left(self) -> float:
        """Estimate the remaining seconds from recent tasks.

        The larger of an estimate by weight and one by number: the time of a small task is that of
        starting it, which its weight does not show.
        """
        weight = sum(weight for weight, _ in self._recent)
        seconds = sum(seconds for _, seconds in self._recent)
        seconds_per_task = seconds / len(self._recent)
        number = self._total - self.done - self.failed - self.blocked
        left = max(
            number * seconds_per_task, self._weight_left * seconds / weight if weight else 0.0
        )
        now = time.monotonic()
        elapsed = sum(min(now - started, seconds_per_task) for started in self._running.values())
        return max(left - elapsed, 0.0) / self._at_once
