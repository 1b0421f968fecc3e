"""How far a sweep is: on a terminal one line that changes, elsewhere one line for each run."""

import logging
import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from launchers.work import Item


logger = logging.getLogger("widthopt")


class Progress:
    """Counts what is done, running and failed, and foretells how long the rest takes.

    Attributes:
        done: Items that are done.
        failed: Items that failed.
        blocked: Items that cannot be done, since what they need failed.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        """Args: items: All that is to be done."""
        self.done = self.failed = self.blocked = 0
        self._all = len(items)
        self._running: dict[str, float] = {}
        self._weight_left = sum(item.weight for item in items)
        self._weight_done = 0.0
        self._started = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal and items:
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

    def start(self, item: Item) -> None:
        """An item has been started."""
        self._running[item.name] = time.monotonic()
        self._show()

    def finish(self, item: Item) -> None:
        """An item is done."""
        self.done += 1
        self._weight_done += item.weight
        self._end(item, "done")

    def fail(self, item: Item, why: str) -> None:
        """An item failed.

        Args:
            item: The item.
            why: What went wrong, in one line.
        """
        self.failed += 1
        self._end(item, f"FAILED ({why})")

    def wait_for_ever(self, item: Item) -> None:
        """An item cannot be done, since what it needs failed."""
        self.blocked += 1
        self._weight_left -= item.weight
        self._show()

    def tick(self) -> None:
        """Some time has passed."""
        self._show()

    def _end(self, item: Item, how: str) -> None:
        started = self._running.pop(item.name)
        self._weight_left -= item.weight
        seconds = time.monotonic() - started
        level = logging.INFO if self._bar is None or how != "done" else logging.DEBUG
        logger.log(level, "%s; %s: %s, %.1f s", self._text(), how, item.what, seconds)
        self._show()

    def _show(self) -> None:
        if self._bar:
            ended = self.done + self.failed + self.blocked
            self._bar.update(self._task, completed=ended, description=self._text())

    def _text(self) -> str:
        """In one line: counts, and the time left at the speed so far."""
        words = [f"{self.done} of {self._all} done"]
        words += [f"{len(self._running)} running"] if self._running else []
        words += [f"{self.failed} failed"] if self.failed else []
        words += [f"{self.blocked} blocked"] if self.blocked else []
        if self._weight_done > 0:
            speed = self._weight_done / (time.monotonic() - self._started)
            left = round(self._weight_left / speed)
            words.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return ", ".join(words)
