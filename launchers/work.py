"""What launchers start: units of work with names, of which some need others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of work.

    Attributes:
        name: Its name, also that of its folder.
        what: What it is, in words.
        needs: Names of what must be done before.
        weight: How much work it is, in any unit that is the same for all.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    weight: float


class Work(Protocol):
    """A sweep that has been planned; `hydra.launcher.work` names what makes one of its points."""

    @property
    def interruptions(self) -> tuple[type[Exception], ...]:
        """What an item raises when it was interrupted, which is no failure."""
        ...

    def begin(self, *, sure: bool) -> None:
        """Say what will be done and check that it can be; nothing has started if it cannot.

        Args:
            sure: Do not ask, however much it is.
        """
        ...

    def items(self) -> Sequence[Item]:
        """What is to be done, and how: everything comes after what it needs."""
        ...

    def freeze(self, name: str) -> Path:
        """Write down all that a process anywhere needs to do one item; where."""
        ...

    def done(self, name: str) -> bool:
        """Whether the result of an item is there."""
        ...

    def failure(self, name: str) -> str:
        """Why an item failed, in one line."""
        ...

    def end(self) -> None:
        """Show what came out."""
        ...


class Failed(Exception):  # noqa: N818 (the name is what happened)
    """Not everything was done; the message says how much was not, in one line."""
