"""What launchers start: named tasks, some of which need others."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work.

    Attributes:
        name: Its name, also that of its folder.
        what: What it is, in words.
        needs: Names of what must be done before.
        weight: How much work it is, in any unit that is the same for all.
        resources: What it asks a cluster for, where that differs from the launcher's.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    weight: float
    resources: Mapping[str, Any] = field(default_factory=dict)


class Workload(Protocol):
    """A sweep that has been planned; `hydra.launcher.workload` names what makes one of its points."""

    @property
    def interruptions(self) -> tuple[type[Exception], ...]:
        """What a task raises when it was interrupted, which is no failure."""
        ...

    @property
    def name(self) -> str:
        """What the sweep is called."""
        ...

    @property
    def root(self) -> Path:
        """The folder that it is kept in, with all that a launcher keeps of it."""
        ...

    @property
    def imports(self) -> Sequence[str]:
        """Modules that its tasks take long to import; whoever forks them may import them once."""
        ...

    def begin(self, *, assume_yes: bool, live: Collection[str] = ()) -> None:
        """Say what will be done and check that it can be; nothing has started if it cannot.

        Args:
            assume_yes: Do not ask, however much it is.
            live: The jobs that a queue knows as waiting or running.
        """
        ...

    def tasks(self) -> Sequence[Task]:
        """What is to be done, and how: everything comes after what it needs."""
        ...

    def write_spec(self, name: str) -> Path:
        """Write down all that a process anywhere needs to do one task; where."""
        ...

    def job(self, name: str) -> str:
        """The job of a queue that was last to do a task; empty if there was none."""
        ...

    def record_job(self, name: str, job: str, **details: str) -> None:
        """Write down that a job of a queue is to do an task."""
        ...

    def is_done(self, name: str) -> bool:
        """Whether the result of a task is there."""
        ...

    def failure(self, name: str) -> str:
        """Why a task failed, in one line."""
        ...

    def end(self) -> None:
        """Show what came out."""
        ...


class Failed(Exception):  # noqa: N818 (the name is what happened)
    """Not everything was done; the message says how much was not, in one line."""
