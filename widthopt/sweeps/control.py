"""What is asked of runs from any shell: their state, their logs, to end, to be tried again."""

import json
import logging
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_plugins.widthopt_launchers import queue, slurm
from hydra_plugins.widthopt_launchers.launcher import relaunch
from hydra_plugins.widthopt_launchers.workload import Failed
from widthopt.errors import InputError
from widthopt.reporting.sweeps import status
from widthopt.runs.manifest import Manifest, load_manifests
from widthopt.runs.states import ENDED, State, root_option
from widthopt.runs.store import Store, StoreEntry, failure_reason
from widthopt.sweeps.worker import launch_folder, run_spec
from widthopt.sweeps.workload import StoredSweep


logger = logging.getLogger("widthopt")

FOLLOW_SECONDS = 0.5
"""Time between two looks at a log that is followed."""

UNKNOWN = "as its files say: the queue does not answer"
"""What is said of a job where nobody knows whether it lives."""

ASK_SECONDS = 10.0
"""Time between two questions to the queue meanwhile."""

GONE_SECONDS = 120
"""How long jobs may take to end that were cancelled."""


@dataclass(frozen=True, slots=True)
class RunRef:
    """One run, and the sweeps that it belongs to."""

    name: str
    stage: StoreEntry
    sweeps: tuple[Manifest, ...]

    @property
    def row(self) -> Mapping[str, Any]:
        """What the sweeps say of it."""
        return self.sweeps[0].own[self.name]


def live_jobs(root: Path) -> Mapping[str, str] | None:
    """The jobs that wait or run, where the root has jobs; None, and said so, if nobody can tell."""
    try:
        return _live(root)
    except InputError as error:
        logger.warning("%s; until then runs are shown as what their files say", error)
        return None


def _live(root: Path) -> Mapping[str, str]:
    """The jobs that wait or run, where the root has jobs.

    Raises:
        InputError: The queue cannot be asked.
    """
    if not (root / "jobs").is_dir():
        return {}
    if not queue.is_available():
        raise InputError(
            f"--root is {root}, but its runs are a queue's and there is no squeue on this machine; "
            "ask on a login node"
        )
    slurm.adopt(root)
    return queue.live_jobs()


def _state_without_queue(stage: StoreEntry, state: State, jobs: Mapping[str, str] | None) -> State:
    """A state where it may be that nobody knows which jobs live: then none counts as ended."""
    if jobs is None and state == "stale" and stage.submission() is not None:
        return "running" if (stage.folder / "claim.json").exists() else "queued"
    return state


def find(root: Path, name: str) -> RunRef:
    """The run that a name or its beginning, with or without its kind, stands for.

    Raises:
        InputError: There is none, or there are several.
    """
    sweeps = load_manifests(root)
    names = sorted({run for sweep in sweeps for run in sweep.own})
    if not names:
        raise InputError(
            f"KEY is {name}, but in {root} there are no sweeps, whose runs have such names; start "
            "one with -m, or see single runs with widthopt report"
        )
    fitting = [run for run in names if run.startswith(name) or run.partition("-")[2] == name]
    fitting = fitting or [run for run in names if run.partition("-")[2].startswith(name)]
    if len(fitting) != 1 or not name:
        known = f"{len(fitting)} runs there begin so" if fitting else "there is no such run"
        raise InputError(
            f"KEY is {name}, but {known} in {root}; "
            f"widthopt status --all {root_option(root)} lists them"
        )
    mine = tuple(sweep for sweep in sweeps if fitting[0] in sweep.own)
    stage = mine[0].entries(Store(root / "stages"))[fitting[0]]
    return RunRef(fitting[0], stage, mine)


def states(root: Path, sweeps: Sequence[Manifest]) -> list[dict[str, Any]]:
    """How far sweeps are, with what the queue knows of them; see `widthopt.sweeps.status`."""
    jobs = live_jobs(root)
    tables = status(root, sweeps, jobs or {})
    rows = [row for table in tables for row in table["runs"]]
    if jobs is None:
        for sweep, table in zip(sweeps, tables, strict=True):
            stages = sweep.entries(Store(root / "stages"))
            for row in table["runs"]:
                state = _state_without_queue(stages[row["name"]], row["state"], jobs)
                row["queue"] = UNKNOWN if state != row["state"] else None
                row["state"] = state
        return tables
    ended = {row["job"] for row in rows if row["state"] in ENDED and not row["why"] and row["job"]}
    causes = slurm.explain_endings(root, ended) if ended and queue.is_available() else {}
    for row in rows:
        row["why"] = row["why"] or (causes.get(row["job"]) if row["state"] in ENDED else None)
        row["queue"] = jobs.get(row["job"]) if row["state"] in {"queued", "running"} else None
    return tables


def show(root: Path, name: str) -> dict[str, Any]:
    """All that is known of one run, as plain data."""
    found = find(root, name)
    stage, jobs = found.stage, live_jobs(root)
    result = stage.result()
    attempts = stage.folder / "attempts.jsonl"
    lines = attempts.read_text("utf-8").splitlines() if attempts.exists() else []
    submission = stage.submission() or {}
    state = found.sweeps[0].states(Store(root / "stages"), jobs or {})[found.name]
    state = _state_without_queue(stage, state, jobs)
    failure = stage.failure() or {}
    return {
        "name": found.name,
        "what": found.row["what"],
        "state": state,
        "why": failure_reason(stage) or None if state in ENDED else None,
        "traceback": failure.get("traceback") if state in ENDED else None,
        "needs": found.row["needs"],
        "sweeps": [sweep.name for sweep in found.sweeps],
        "folder": str(stage.folder),
        "job": submission.get("job"),
        "queue": UNKNOWN if jobs is None else jobs.get(str(submission.get("job"))),
        "code": submission.get("code"),
        "attempts": [json.loads(line) for line in lines],
        "macs": found.row["macs"],
        "result": result,
    }


def logs(root: Path, name: str, *, rank: int, follow: bool) -> Iterator[str]:
    """What a run printed, and what its job printed before it began.

    Args:
        root: The folder that runs are kept in.
        name: The run's, or how it begins.
        rank: Which of its processes.
        follow: Go on with what it prints until it has ended.

    Raises:
        InputError: There is no such run, or no such process.
    """
    stage = find(root, name).stage
    path = stage.folder / (f"log-{rank}.txt" if rank else "log.txt")
    early = (stage.submission() or {}).get("log")
    before = [root / f"{early}_{rank}_log.{kind}" for kind in ("err", "out")] if early else []
    printed = [path for path in before if path.exists()]
    yield from (path.read_text("utf-8", "replace") for path in printed)
    if follow:
        yield from _follow(path, root, stage)
        late = [path for path in before if path not in printed and path.exists()]
        yield from (path.read_text("utf-8", "replace") for path in late)
    elif path.exists():
        yield path.read_text("utf-8", "replace")
    elif not early:
        raise InputError(
            f"KEY is {stage.folder.name}, but process {rank} of it has printed nothing; see "
            f"widthopt show {stage.folder.name} {root_option(root)}"
        )


def _follow(path: Path, root: Path, stage: StoreEntry) -> Iterator[str]:
    """What is in a log, and what comes, until the run has ended."""
    read, jobs, queried = 0, live_jobs(root), time.monotonic()
    while True:
        if time.monotonic() > queried + ASK_SECONDS:
            jobs, queried = live_jobs(root), time.monotonic()
        ended = _state_without_queue(stage, stage.state(jobs or {}), jobs) not in {
            "queued",
            "running",
        }
        if path.exists():
            with path.open("rb") as file:
                file.seek(read)
                new = file.read()
            read += len(new)
            if new:
                yield new.decode("utf-8", "replace")
        if ended:
            return
        time.sleep(FOLLOW_SECONDS)


def cancel(root: Path, name: str, *, force: bool) -> list[str]:
    """End the jobs of a sweep or of one run, and wait until they are gone.

    Args:
        root: The folder that runs are kept in.
        name: A sweep's or a run's, or how it begins.
        force: End also what other sweeps need.

    Returns:
        The names of the runs whose jobs were ended.

    Raises:
        InputError: There is neither; or SLURM would not.
    """
    sweeps, chosen = _sweeps_or_run(root, name)
    mine = {sweep.name for sweep in sweeps}
    rest = {
        run
        for manifest in load_manifests(root)
        if manifest.name not in mine
        for run in manifest.own
    }
    jobs = _live(root)
    wanted: dict[str, str] = {}
    for sweep in sweeps:
        for run, stage in sweep.entries(Store(root / "stages")).items():
            job = str((stage.submission() or {}).get("job", ""))
            if run not in sweep.own or job not in jobs or (chosen and run not in chosen):
                continue
            if run in rest and not force:
                logger.info("%s goes on, since another sweep needs it; --force ends it too", run)
                continue
            wanted[run] = job
    if wanted:
        _end(set(wanted.values()))
    return sorted(wanted)


def _end(jobs: Collection[str]) -> None:
    """End jobs, and wait until they are gone."""
    refused = None
    try:
        queue.cancel(jobs)
    except InputError as error:  # for one of them, which may have ended meanwhile
        refused = error
    until = time.monotonic() + GONE_SECONDS
    while left := set(jobs) & set(queue.live_jobs()):
        if time.monotonic() > until:
            raise refused or InputError(
                f"scancel has ended {len(jobs) - len(left)} jobs of {len(jobs)}, but not yet "
                f"{', '.join(sorted(left))}; see squeue"
            )
        time.sleep(FOLLOW_SECONDS)


def retry(root: Path, name: str) -> None:
    """Do again what failed or is missing of a sweep, or one run, as it was started before.

    It is done as it was frozen, with the code of today.

    Raises:
        InputError: There is neither, or it cannot be done.
    """
    sweeps, chosen = _sweeps_or_run(root, name)
    for sweep in sweeps if not chosen else sweeps[:1]:
        relaunch(StoredSweep(root.resolve(), sweep, chosen))


def run_now(root: Path, name: str) -> None:
    """Do one run here and now, in this process, as it was frozen.

    Raises:
        InputError: There is no such run, or it cannot be done.
        Failed: It was not done all the same.
    """
    stage = find(root, name).stage
    spec = stage.folder / "spec.json"
    if (folder := launch_folder(spec)) is not None:
        sys.path.append(str(folder))  # its network may be a module there
    run_spec(spec)
    state = stage.state()
    if state != "done":
        raise Failed(
            f"{stage.folder.name} is {state}, but it was to be done; see widthopt show "
            f"{stage.folder.name} {root_option(root)}"
        )


def _sweeps_or_run(root: Path, name: str) -> tuple[list[Manifest], list[str]]:
    """The sweeps of a name, or those of the run of that name, and that run."""
    try:
        return load_manifests(root, [name]), []
    except InputError:
        found = find(root, name)
        return list(found.sweeps), [found.name]


def write(parts: Iterator[str]) -> None:
    """Print text as it comes."""
    for part in parts:
        sys.stdout.write(part)
        sys.stdout.flush()
