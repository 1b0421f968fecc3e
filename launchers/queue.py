"""The SLURM commands: jobs in the queue, limits, and error messages.

No command needs accounting. ``sacct`` only adds how jobs ended that ``scontrol`` no longer knows.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping

from widthopt.errors import InputError


TIMEOUT_SECONDS = 60
"""Time limit of one SLURM command, which retries by itself while the controller is busy."""

_ARRAY_SIZE = 1001
"""SLURM's default of MaxArraySize."""

_MAX_JOBS = 500
"""The most jobs in one command, whose length the system limits."""

_USER_FORMATS = ("SQUEUE_", "SACCT_", "SCONTROL_")
"""Variables with which a user changes the columns or the jobs that these commands print."""


def is_available() -> bool:
    """Return whether this machine has the SLURM commands."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def query(*words: str) -> str:
    """Return the output of a SLURM command.

    Raises:
        InputError: There is no such command, or it fails; the message contains SLURM's.
    """
    done = _execute(*words)
    if done.returncode:
        raise InputError(
            f"{words[0]} is refused by SLURM ({error_text(done.stderr)}), but it must succeed; "
            "correct the cause, or try again later"
        )
    return done.stdout


def _execute(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a SLURM command.

    Raises:
        InputError: There is no such command, or it does not end.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_USER_FORMATS)
    }
    try:
        return subprocess.run(  # noqa: S603 (SLURM commands)
            words,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
            env=environment,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"hydra/launcher is one of SLURM's, but there is no {words[0]} on this machine; start "
            "on a login node of the cluster, or use hydra/launcher=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{words[0]} gives no answer for {TIMEOUT_SECONDS} s, but SLURM's controller must answer; "
            "check it with scontrol ping, and try again later"
        ) from error


def error_text(text: str) -> str:
    """Return a SLURM error in one line, without the names of commands."""
    lines = [re.sub(r"^(\w+: )?(error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no message"


def live_jobs() -> dict[str, str]:
    """Return this user's pending and running jobs: the state of each, and why it is pending.

    Elements of an array are jobs called ``JOB_INDEX``. A job whose dependency failed is left out,
    since SLURM is about to cancel it.

    Raises:
        InputError: SLURM's controller does not answer.
    """
    # By user id: USER in the environment may be somebody else.
    text = query("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r")
    jobs = {}
    for line in text.splitlines():
        job, state, reason = (*line.strip().split("|", 2), "", "")[:3]
        if state and reason != "DependencyNeverSatisfied":  # a line may only name the cluster
            jobs[job] = state if reason in {"None", ""} else f"{state} ({reason})"
    return jobs


def array_elements(name: str) -> dict[int, str]:
    """Return the jobs of the array of this name by index; a single job has index 0."""
    text = query("squeue", "-h", "-r", "-n", name, "-o", "%i")
    jobs = sorted(line.strip() for line in text.splitlines() if line.strip())
    return {int(job.partition("_")[2] or 0): job for job in jobs}


def hosts() -> set[str]:
    """Return the host names of compute nodes, without those that run on this machine."""
    nodes = query("scontrol", "-o", "show", "node").splitlines()
    remote = [node for node in nodes if not re.search(r"\bNodeAddr=(127\.|localhost\b)", node)]
    return {name for node in remote for name in re.findall(r"\bNodeHostName=(\S+)", node)}


def array_size() -> int:
    """Return the largest size of an array (``MaxArraySize`` is a limit of the index)."""
    match = re.search(
        r"^MaxArraySize\s*=\s*(\d+)", query("scontrol", "show", "config"), re.MULTILINE
    )
    return max(1, int(match[1]) if match else _ARRAY_SIZE)


def check(options: Mapping[str, str]) -> None:
    """Check that SLURM accepts a job with these options. No job is submitted.

    Args:
        options: Options of ``sbatch`` by name; an empty value is a flag.

    Raises:
        InputError: SLURM refuses the job, or would never start it.
    """
    done = _execute("sbatch", "--test-only", *to_arguments(options), "--wrap", "true")
    if done.returncode:
        arguments = " ".join(to_arguments(options))
        raise InputError(
            f"sbatch is given {arguments}, but SLURM refuses it ({error_text(done.stderr)}); correct "
            "hydra.launcher; nothing was submitted"
        )
    # SLURM accepts a time limit above the partition's, and then never starts the job.
    partitions = options.get("partition") or os.environ.get("SBATCH_PARTITION")
    limits = {}
    for line in query("scontrol", "-o", "show", "partition").splitlines():
        values = dict(word.partition("=")[::2] for word in line.split())
        name = values.get("PartitionName", "")
        if name in partitions.split(",") if partitions else values.get("Default") == "YES":
            limits[name] = _minutes(values.get("MaxTime", ""))
    minutes = float(options["time"])
    for name, limit in limits.items():
        if all(value is not None and minutes > value for value in limits.values()):
            raise InputError(
                f"hydra.launcher.resources.minutes is {options['time']}, but the time limit of "
                f"partition {name} is {limit:g}; use less: a run that needs longer is requeued and "
                "resumes"
            )


def to_arguments(options: Mapping[str, str]) -> list[str]:
    """Return options as command-line arguments; an empty value is a flag."""
    return [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]


def _minutes(text: str) -> float | None:
    """Convert SLURM's ``days-hours:minutes:seconds`` to minutes; None if there is no limit."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or len(parts) != 3:  # noqa: PLR2004
        return None
    hours, minutes, seconds = (int(part) for part in parts)
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def cancel(jobs: Collection[str]) -> None:
    """Cancel these jobs, pending or running."""
    for batch in _batches(jobs):
        query("scancel", *batch)


def _batches(jobs: Collection[str]) -> list[list[str]]:
    """Split jobs, in order, into batches that fit into one command."""
    ordered = sorted(jobs)
    return [ordered[first : first + _MAX_JOBS] for first in range(0, len(ordered), _MAX_JOBS)]


def job_endings(jobs: Collection[str]) -> dict[str, str]:
    """Return how jobs ended, as far as SLURM still knows, by job.

    Args:
        jobs: Names of jobs that are no longer in the queue.
    """
    endings: dict[str, str] = {}
    accounting = "sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode", "-j"
    for command in (
        *([*accounting, ",".join(batch)] for batch in _batches(jobs)),
        *(["scontrol", "-o", "show", "job", job] for job in sorted(jobs)[:20]),
    ):
        if command[0] == "scontrol" and command[-1] in endings:
            continue
        try:
            text = query(*command)
        except InputError:  # no accounting, or the job is forgotten: the caller does without
            continue
        for line in text.splitlines():
            if command[0] == "sacct":
                job, state, code = line.split("|")
                endings[job] = f"SLURM: {state}, exit code {code}"
            else:
                values = dict(word.partition("=")[::2] for word in line.split())
                reason = values.get("Reason", "None")
                state = values.get("JobState", "?") + ("" if reason == "None" else f", {reason}")
                endings[command[-1]] = f"SLURM: {state}, exit code {values.get('ExitCode')}"
    return endings
