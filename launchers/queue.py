"""What SLURM knows: the jobs that live, its limits, and its own words where it refuses.

Only its commands are used, and none that needs accounting; ``sacct`` is asked for how a job
ended where ``scontrol`` has forgotten it, and does without.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping

from widthopt.errors import InputError


PATIENCE_SECONDS = 60
"""How long one command of SLURM's may take: its controller is asked again by the command itself."""

_ARRAY_SIZE = 1001
"""SLURM's own default of MaxArraySize."""

_AT_ONCE = 500
"""Jobs that are named in one command, whose words the system bounds."""

_HABITS = ("SQUEUE_", "SACCT_", "SCONTROL_")
"""How a person likes these commands to answer: other columns, or some jobs only."""


def is_available() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def query(*words: str) -> str:
    """What one of SLURM's commands answers.

    Raises:
        InputError: It is not there, or SLURM refuses; with SLURM's own words.
    """
    done = _execute(*words)
    if done.returncode:
        raise InputError(
            f"{words[0]} is refused by SLURM ({words_of(done.stderr)}), but it has to succeed; "
            "correct what it names, or try the same again later"
        )
    return done.stdout


def _execute(*words: str) -> "subprocess.CompletedProcess[str]":
    """How one of SLURM's commands ended.

    Raises:
        InputError: It is not there, or it does not end.
    """
    plain = {name: one for name, one in os.environ.items() if not name.startswith(_HABITS)}
    try:
        return subprocess.run(  # noqa: S603 (SLURM's own commands)
            words, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, env=plain
        )
    except FileNotFoundError as error:
        raise InputError(
            f"hydra/launcher is one of SLURM's, but there is no {words[0]} on this machine; start "
            "on a login node of the cluster, or use hydra/launcher=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{words[0]} is silent for {PATIENCE_SECONDS} s, but SLURM's controller has to answer; "
            "try scontrol ping, and the same again later"
        ) from error


def words_of(text: str) -> str:
    """SLURM's complaint without the names of its commands, in one line."""
    lines = [re.sub(r"^(\w+: )?(error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "without a word"


def live_jobs() -> dict[str, str]:
    """The jobs of this user that wait or run: by name, their state and why they wait.

    The elements of an array are jobs of their own, called ``JOB_INDEX``. What waits for a job that
    has failed does not live: SLURM is about to cancel it.

    Raises:
        InputError: SLURM's controller does not answer.
    """
    # By number: the name that the environment has may be another one's.
    text = query("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r")
    found = {}
    for line in text.splitlines():
        job, state, reason = (*line.strip().split("|", 2), "", "")[:3]
        if state and reason != "DependencyNeverSatisfied":  # a line may name the cluster
            found[job] = state if reason in {"None", ""} else f"{state} ({reason})"
    return found


def array_elements(name: str) -> dict[int, str]:
    """The live elements of the array of this name, by index; a single job has index 0."""
    text = query("squeue", "-h", "-r", "-n", name, "-o", "%i")
    jobs = sorted(line.strip() for line in text.splitlines() if line.strip())
    return {int(job.partition("_")[2] or 0): job for job in jobs}


def hosts() -> set[str]:
    """The machines that are nodes, as they call themselves, but for those at this one's address."""
    nodes = query("scontrol", "-o", "show", "node").splitlines()
    away = [one for one in nodes if not re.search(r"\bNodeAddr=(127\.|localhost\b)", one)]
    return {name for one in away for name in re.findall(r"\bNodeHostName=(\S+)", one)}


def array_size() -> int:
    """How many elements one array may have (``MaxArraySize`` bounds the index)."""
    found = re.search(
        r"^MaxArraySize\s*=\s*(\d+)", query("scontrol", "show", "config"), re.MULTILINE
    )
    return max(1, int(found[1]) if found else _ARRAY_SIZE)


def check(options: Mapping[str, str]) -> None:
    """Ask SLURM whether it would take a job with these options; none is submitted.

    Args:
        options: Of ``sbatch``, by name; an empty value is a flag.

    Raises:
        InputError: It would not, in its own words; or it would, and never start it.
    """
    done = _execute("sbatch", "--test-only", *words_for(options), "--wrap", "true")
    if done.returncode:
        shown = " ".join(words_for(options))
        raise InputError(
            f"sbatch is given {shown}, but SLURM refuses it ({words_of(done.stderr)}); correct "
            "hydra.launcher, nothing was submitted"
        )
    # A limit above the partition's is taken, and then the job waits for ever.
    named = options.get("partition") or os.environ.get("SBATCH_PARTITION")
    limits = {}
    for line in query("scontrol", "-o", "show", "partition").splitlines():
        said = dict(word.partition("=")[::2] for word in line.split())
        name = said.get("PartitionName", "")
        if name in named.split(",") if named else said.get("Default") == "YES":
            limits[name] = _minutes(said.get("MaxTime", ""))
    for name, most in limits.items():
        if all(one is not None and float(options["time"]) > one for one in limits.values()):
            raise InputError(
                f"hydra.launcher.resources.minutes is {options['time']}, but the time limit of "
                f"partition {name} is {most:g}; use less: a run that needs longer is put back and "
                "goes on"
            )


def words_for(options: Mapping[str, str]) -> list[str]:
    """Options as they are typed; an empty value is a flag."""
    return [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]


def _minutes(text: str) -> float | None:
    """SLURM's ``days-hours:minutes:seconds`` in minutes; None where there is no limit."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or len(parts) != 3:  # noqa: PLR2004
        return None
    hours, minutes, seconds = (int(part) for part in parts)
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def cancel(jobs: Collection[str]) -> None:
    """End these jobs, whether they wait or run."""
    for some in _portions(jobs):
        query("scancel", *some)


def _portions(jobs: Collection[str]) -> list[list[str]]:
    """Jobs in order, as many at once as one command may name."""
    ordered = sorted(jobs)
    return [ordered[first : first + _AT_ONCE] for first in range(0, len(ordered), _AT_ONCE)]


def job_endings(jobs: Collection[str]) -> dict[str, str]:
    """How jobs ended that do not live any more, as far as SLURM still knows; by job.

    Args:
        jobs: As SLURM calls them.
    """
    found: dict[str, str] = {}
    asked = "sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode", "-j"
    for command in (
        *([*asked, ",".join(some)] for some in _portions(jobs)),
        *(["scontrol", "-o", "show", "job", job] for job in sorted(jobs)[:20]),
    ):
        if command[0] == "scontrol" and command[-1] in found:
            continue
        try:
            text = query(*command)
        except InputError:  # no accounting, or forgotten: it is only said to be helpful
            continue
        for line in text.splitlines():
            if command[0] == "sacct":
                job, state, code = line.split("|")
                found[job] = f"SLURM: {state}, exit code {code}"
            else:
                said = dict(word.partition("=")[::2] for word in line.split())
                reason = said.get("Reason", "None")
                words = [said.get("JobState", "?"), *([] if reason == "None" else [reason])]
                found[command[-1]] = f"SLURM: {', '.join(words)}, exit code {said.get('ExitCode')}"
    return found
