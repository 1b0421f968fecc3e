"""The protocol between launchers and a planned sweep: named tasks, some of which need others."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work.

    Attributes:
        name: The task's name, also that of its folder.
        what: A description for people.
        needs: Names of the tasks that must be done first.
        weight: The amount of work, in any unit that is the same for all tasks.
        resources: Cluster resources that differ from those of the launcher.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    weight: float
    resources: Mapping[str, Any] = field(default_factory=dict)


class Workload(Protocol):
    """A planned sweep. ``hydra.launcher.workload`` names the class that plans its points."""

    @property
    def interruptions(self) -> tuple[type[Exception], ...]:
        """Exceptions that a task raises when it is interrupted, which is not a failure."""
        ...

    @property
    def name(self) -> str:
        """The sweep's name."""
        ...

    @property
    def root(self) -> Path:
        """The folder that holds the sweep's runs and the launcher's own files."""
        ...

    @property
    def imports(self) -> Sequence[str]:
        """Modules that are slow to import; a fork server imports them once for all tasks."""
        ...

    def begin(self, *, assume_yes: bool, live: Collection[str] = ()) -> None:
        """Print the plan and check that it can be done. Nothing starts if it cannot.

        Args:
            assume_yes: Do not ask for confirmation, however large the sweep is.
            live: Jobs that are pending or running in the queue.
        """
        ...

    def tasks(self) -> Sequence[Task]:
        """Return the tasks that are not done; each comes after the tasks that it needs."""
        ...

    def write_spec(self, name: str) -> Path:
        """Write everything that a process needs to run one task, and return the file's path."""
        ...

    def job(self, name: str) -> str:
        """Return the last job that was submitted for a task; empty if there is none."""
        ...

    def record_job(self, name: str, job: str, **details: str) -> None:
        """Record that a job was submitted for a task."""
        ...

    def is_done(self, name: str) -> bool:
        """Return whether the result of a task exists."""
        ...

    def failure(self, name: str) -> str:
        """Return why a task failed, in one line."""
        ...

    def end(self) -> None:
        """Show the results."""
        ...


class Failed(Exception):  # noqa: N818 (the exit code is that of a failure, not of an error)
    """Part of the work was not done. The message says how much, in one line."""
