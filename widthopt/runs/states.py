"""States of stored results."""

import os
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal


State = Literal["missing", "queued", "running", "stale", "failed", "blocked", "done"]


def current_job() -> str:
    """Return the id of the SLURM job that this process belongs to, or an empty string.

    The id of an element of an array is ``<array job>_<index>``.
    """
    array, element = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{element}" if array and element else os.environ.get("SLURM_JOB_ID", "")


def root_option(root: Path) -> str:
    """Return the option ``--root`` as a user types it."""
    return f"--root {shlex.quote(str(root))}"


def mark_blocked(
    states: Mapping[str, State], needs: Mapping[str, Collection[str]]
) -> dict[str, State]:
    """Return the states, with entries that wait for a failed entry marked as "blocked".

    Only a missing or stale entry can be blocked, by an entry that it needs and that is failed or
    blocked.

    Args:
        states: State of each entry by name.
        needs: Names of the entries whose results an entry needs, by name.
    """
    after: dict[str, list[str]] = {}
    for name, wanted in needs.items():
        for need in wanted:
            after.setdefault(need, []).append(name)
    result = dict(states)
    front = [name for name, state in result.items() if state in ("failed", "blocked")]
    while front:
        for name in after.get(front.pop(), ()):
            if result.get(name) in ("missing", "stale"):
                result[name] = "blocked"
                front.append(name)
    return result


ENDED: tuple[State, ...] = ("failed", "stale")
"""States of runs that were started and ended without a result."""
