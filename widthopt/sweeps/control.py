"""Commands on runs: status, show, logs, cancel, retry, run."""

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
"""Seconds between two reads of a log that is followed."""

UNKNOWN = "from its files; the queue does not answer"
"""Queue state that is shown if the queue does not answer."""

ASK_SECONDS = 10.0
"""Seconds between two queries of the queue while a log is followed."""

GONE_SECONDS = 120
"""Longest time in seconds that cancelled jobs may take to end."""


@dataclass(frozen=True, slots=True)
class RunRef:
    """One run, and the sweeps that it belongs to."""

    name: str
    entry: StoreEntry
    sweeps: tuple[Manifest, ...]

    @property
    def row(self) -> Mapping[str, Any]:
        """The values of the run in the manifest."""
        return self.sweeps[0].own[self.name]


def live_jobs(root: Path) -> Mapping[str, str] | None:
    """Return the pending and running jobs; None, with a warning, if the queue does not answer."""
    try:
        return _query_jobs(root)
    except InputError as error:
        logger.warning("%s; until then the states are those in the files", error)
        return None


def _query_jobs(root: Path) -> Mapping[str, str]:
    """Return the pending and running jobs; none if no job was submitted from the root.

    Raises:
        InputError: The queue does not answer.
    """
    if not (root / "jobs").is_dir():
        return {}
    if not queue.is_available():
        raise InputError(
            f"--root is {root}, whose runs are SLURM jobs, but there is no squeue on this machine; "
            "use a login node"
        )
    slurm.adopt(root)
    return queue.live_jobs()


def _state_without_queue(entry: StoreEntry, state: State, jobs: Mapping[str, str] | None) -> State:
    """Return the state of an entry. Without an answer of the queue, no job counts as ended."""
    if jobs is None and state == "stale" and entry.submission() is not None:
        return "running" if (entry.folder / "claim.json").exists() else "queued"
    return state


def find(root: Path, name: str) -> RunRef:
    """Return the run of a name, a key, or a prefix of either.

    Raises:
        InputError: No run matches, or several do.
    """
    sweeps = load_manifests(root)
    names = sorted({run for sweep in sweeps for run in sweep.own})
    if not names:
        raise InputError(
            f"KEY is {name}, but {root} contains no sweep, and only runs of sweeps have keys; "
            "start a sweep with -m, or show single runs with widthopt report"
        )
    matches = [run for run in names if run.startswith(name) or run.partition("-")[2] == name]
    matches = matches or [run for run in names if run.partition("-")[2].startswith(name)]
    if len(matches) != 1 or not name:
        known = f"{len(matches)} runs match" if matches else "no run matches"
        raise InputError(
            f"KEY is {name}, but {known} in {root}; "
            f"list the runs with widthopt status --all {root_option(root)}"
        )
    containing = tuple(sweep for sweep in sweeps if matches[0] in sweep.own)
    entry = containing[0].entries(Store.below(root))[matches[0]]
    return RunRef(matches[0], entry, containing)


def states(root: Path, sweeps: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Return the states of sweeps with those of their jobs; see `reporting.sweeps.status`."""
    jobs = live_jobs(root)
    tables = status(root, sweeps, jobs or {})
    rows = [row for table in tables for row in table["runs"]]
    if jobs is None:
        for sweep, table in zip(sweeps, tables, strict=True):
            entries = sweep.entries(Store.below(root))
            for row in table["runs"]:
                state = _state_without_queue(entries[row["name"]], row["state"], jobs)
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
    """Return everything that is recorded for a run, as plain data."""
    run = find(root, name)
    entry, jobs = run.entry, live_jobs(root)
    result = entry.result()
    attempts = entry.folder / "attempts.jsonl"
    lines = attempts.read_text("utf-8").splitlines() if attempts.exists() else []
    submission = entry.submission() or {}
    state = run.sweeps[0].states(Store.below(root), jobs or {})[run.name]
    state = _state_without_queue(entry, state, jobs)
    failure = entry.failure() or {}
    return {
        "name": run.name,
        "what": run.row["what"],
        "state": state,
        "why": failure_reason(entry) or None if state in ENDED else None,
        "traceback": failure.get("traceback") if state in ENDED else None,
        "needs": run.row["needs"],
        "sweeps": [sweep.name for sweep in run.sweeps],
        "folder": str(entry.folder),
        "job": submission.get("job"),
        "queue": UNKNOWN if jobs is None else jobs.get(str(submission.get("job"))),
        "code": submission.get("code"),
        "attempts": [json.loads(line) for line in lines],
        "macs": run.row["macs"],
        "result": result,
    }


def logs(root: Path, name: str, *, rank: int, follow: bool) -> Iterator[str]:
    """Yield the output of a run, after the output of its job before the run started.

    Args:
        root: The folder of runs.
        name: Name or prefix of the name of a run.
        rank: Rank of the process.
        follow: Continue until the run has ended.

    Raises:
        InputError: There is no such run, or the process has no output.
    """
    entry = find(root, name).entry
    path = entry.folder / (f"log-{rank}.txt" if rank else "log.txt")
    job_log = (entry.submission() or {}).get("log")
    job_logs = [root / f"{job_log}_{rank}_log.{kind}" for kind in ("err", "out")] if job_log else []
    printed = [path for path in job_logs if path.exists()]
    yield from (path.read_text("utf-8", "replace") for path in printed)
    if follow:
        yield from _follow(path, root, entry)
        late = [path for path in job_logs if path not in printed and path.exists()]
        yield from (path.read_text("utf-8", "replace") for path in late)
    elif path.exists():
        yield path.read_text("utf-8", "replace")
    elif not job_log:
        raise InputError(
            f"KEY is {entry.folder.name}, but its process {rank} has no output; see "
            f"widthopt show {entry.folder.name} {root_option(root)}"
        )


def _follow(path: Path, root: Path, entry: StoreEntry) -> Iterator[str]:
    """Yield the content of a log as it grows, until the run has ended."""
    read, jobs, queried = 0, live_jobs(root), time.monotonic()
    while True:
        if time.monotonic() > queried + ASK_SECONDS:
            jobs, queried = live_jobs(root), time.monotonic()
        ended = _state_without_queue(entry, entry.state(jobs or {}), jobs) not in {
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
    """Cancel the jobs of a sweep or of one run, and wait until they have ended.

    Args:
        root: The folder of runs.
        name: Name or prefix of the name of a sweep or run.
        force: Also cancel runs that other sweeps need.

    Returns:
        The names of the runs whose jobs were cancelled.

    Raises:
        InputError: There is no such sweep or run, or SLURM refuses.
    """
    sweeps, chosen = _sweeps_or_run(root, name)
    chosen_sweeps = {sweep.name for sweep in sweeps}
    needed = {
        run
        for manifest in load_manifests(root)
        if manifest.name not in chosen_sweeps
        for run in manifest.own
    }
    jobs = _query_jobs(root)
    wanted: dict[str, str] = {}
    for sweep in sweeps:
        for run, entry in sweep.entries(Store.below(root)).items():
            job = str((entry.submission() or {}).get("job", ""))
            if run not in sweep.own or job not in jobs or (chosen and run not in chosen):
                continue
            if run in needed and not force:
                logger.info("%s continues, because another sweep needs it; --force cancels it", run)
                continue
            wanted[run] = job
    if wanted:
        _cancel_jobs(set(wanted.values()))
    return sorted(wanted)


def _cancel_jobs(jobs: Collection[str]) -> None:
    """Cancel jobs and wait until they have ended."""
    refused = None
    try:
        queue.cancel(jobs)
    except InputError as error:  # possibly because a job has just ended
        refused = error
    deadline = time.monotonic() + GONE_SECONDS
    while left := set(jobs) & set(queue.live_jobs()):
        if time.monotonic() > deadline:
            raise refused or InputError(
                f"scancel has ended {len(jobs) - len(left)} of {len(jobs)} jobs, but not yet "
                f"{', '.join(sorted(left))}; check them with squeue"
            )
        time.sleep(FOLLOW_SECONDS)


def retry(root: Path, name: str) -> None:
    """Run again the failed and missing runs of a sweep, or one run.

    The runs use the specs that were written when the sweep was started, and the current code.

    Raises:
        InputError: There is no such sweep or run, or it cannot be started.
    """
    sweeps, chosen = _sweeps_or_run(root, name)
    for sweep in sweeps if not chosen else sweeps[:1]:
        relaunch(StoredSweep(root.resolve(), sweep, chosen))


def run_now(root: Path, name: str) -> None:
    """Do one run in this process, from the spec that was written when the sweep was started.

    Raises:
        InputError: There is no such run, or a run that it needs is not done.
        Failed: The run is not done afterwards.
    """
    entry = find(root, name).entry
    spec = entry.folder / "spec.json"
    if (folder := launch_folder(spec)) is not None:
        sys.path.append(str(folder))  # may contain the module of its network
    run_spec(spec)
    state = entry.state()
    if state != "done":
        raise Failed(
            f"{entry.folder.name} is {state}, but it should be done; see widthopt show "
            f"{entry.folder.name} {root_option(root)}"
        )


def _sweeps_or_run(root: Path, name: str) -> tuple[list[Manifest], list[str]]:
    """Return the sweeps of a name; or the run of that name and the sweeps that contain it."""
    try:
        return load_manifests(root, [name]), []
    except InputError:
        run = find(root, name)
        return list(run.sweeps), [run.name]


def write(parts: Iterator[str]) -> None:
    """Print text as it arrives."""
    for part in parts:
        sys.stdout.write(part)
        sys.stdout.flush()
