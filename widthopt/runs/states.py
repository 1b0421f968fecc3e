"""States of stored results, and what the words of messages about them need."""

import os
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal


State = Literal["missing", "queued", "running", "stale", "failed", "blocked", "done"]


def current_job() -> str:
    """The job of a queue that this process is a part of, as the queue names it; or nothing.

    An element of an array of SLURM's is called by the array's job and its index.
    """
    array, element = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{element}" if array and element else os.environ.get("SLURM_JOB_ID", "")


def root_option(root: Path) -> str:
    """How a command is told where runs are kept, as it is typed."""
    return f"--root {shlex.quote(str(root))}"


def mark_blocked(
    states: Mapping[str, State], needs: Mapping[str, Collection[str]]
) -> dict[str, State]:
    """The same states, with what cannot start because of a failure before it as "blocked".

    Only what is missing or stale can be blocked, by a need that failed or is blocked itself;
    what is queued, runs or is done passes nothing on.

    Args:
        states: The state of each stage, by any name.
        needs: By the same names, the stages whose results a stage needs.
    """
    after: dict[str, list[str]] = {}
    for name, wanted in needs.items():
        for need in wanted:
            after.setdefault(need, []).append(name)
    found = dict(states)
    front = [name for name, state in found.items() if state in ("failed", "blocked")]
    while front:
        for name in after.get(front.pop(), ()):
            if found.get(name) in ("missing", "stale"):
                found[name] = "blocked"
                front.append(name)
    return found


ENDED: tuple[State, ...] = ("failed", "stale")
"""States of runs that somebody worked on and nobody does any more."""
