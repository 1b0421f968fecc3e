"""Submission of a sweep to SLURM through submitit: one job for each task.

Everything is planned, written and checked before the first ``sbatch``. Then tasks are submitted as
arrays, and the command ends. The same command again submits what is missing: SLURM says which
jobs are in the queue, and the files of the runs say which are done.
"""

import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_plugins.widthopt_launchers import queue
from hydra_plugins.widthopt_launchers.progress import Progress
from hydra_plugins.widthopt_launchers.snapshot import snapshot
from hydra_plugins.widthopt_launchers.worker import Order, run_order
from hydra_plugins.widthopt_launchers.workload import Failed, Task, Workload
from widthopt.errors import InputError
from widthopt.files import write_atomically, writing
from widthopt.runs.states import root_option


logger = logging.getLogger("widthopt")

POLL_SECONDS = 10.0
"""Seconds between two queries of the queue while the command waits for its jobs."""

_ENCLOSING = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_RESERVED = (
    "job-name", "array", "dependency", "signal", "output", "error", "open-mode", "requeue",
    "no-requeue", "wait", "parsable", "test-only", "wrap",
)  # fmt: skip
"""Options of ``sbatch`` that the launcher sets itself, or that change the command's output."""

_VARIABLES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX"}
"""Names of the variables of ``sbatch`` that differ from those of the options."""

_LOCAL = {"tmpfs", "ramfs", "devtmpfs"}
_DISKS = {"btrfs", "ext2", "ext3", "ext4", "overlay", "xfs", "zfs"}
"""File systems of a machine's own disks; other machines see them only if they are exported."""

_IGNORE_SIGUSR2 = """bash -c 'trap "" USR2; exec "$@"' bash"""
"""Runs a command that ignores SIGUSR2 until Python, after some seconds, can handle it."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one job.

    Attributes:
        minutes: Time limit.
        nodes: Number of nodes.
        tasks_per_node: Processes on each node; all of them train together.
        gpus_per_node: Accelerators on each node.
        cpus_per_task: CPU cores of each process.
        memory_gb: Memory of each node; None for SLURM's default.
    """

    minutes: int
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    memory_gb: float | None

    @classmethod
    def of(cls, values: Mapping[str, Any], changes: Mapping[str, Any], *, key: str) -> "Resources":
        """Merge the launcher's values with those of one task.

        Args:
            values: The launcher's values.
            changes: The values of one task that differ.
            key: The key of the changes, for messages.

        Raises:
            InputError: A name is unknown, or a value is out of range.
        """
        for name in changes:
            if name not in values:
                raise InputError(
                    f"{key}.{name} is not a key, but the resources are {', '.join(values)}; correct it"
                )
        merged = {**values, **changes}
        for name, value in merged.items():
            least = 0 if name in {"gpus_per_node", "memory_gb"} else 1
            is_number = isinstance(value, int) or (name == "memory_gb" and isinstance(value, float))
            if value is None and name == "memory_gb":
                continue
            if not is_number or isinstance(value, bool) or value < least:
                where = key if name in changes else "hydra.launcher.resources"
                raise InputError(
                    f"{where}.{name} is {value}, but it is a number of at least {least}; correct it"
                )
        return cls(**merged)


@dataclass(frozen=True)
class Slurm:
    """Submits tasks. ``conf/hydra/launcher/slurm.yaml`` explains the values."""

    run_spec: str
    resources: Mapping[str, Any]
    options: Mapping[str, Any]
    gpus_as: str
    parallelism: int
    warn_seconds: int
    requeue: bool
    max_requeues: int
    setup: Sequence[str]
    python: str | None
    packages: Sequence[str]
    code: Sequence[str]

    def __post_init__(self) -> None:
        if self.gpus_as not in {"gpus-per-node", "gres", "none"}:
            raise InputError(
                f"hydra.launcher.gpus_as is {self.gpus_as}, but it must be gpus-per-node, gres or "
                "none; correct it"
            )
        for name, least in (("parallelism", 1), ("warn_seconds", 1), ("max_requeues", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise InputError(
                    f"hydra.launcher.{name} is {getattr(self, name)}, but it is an integer of "
                    f"at least {least}; correct it"
                )
        for name in ("setup", "packages", "code"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                item = "" if value is None else f'"{value}"'
                raise InputError(
                    f"hydra.launcher.{name} is {'null' if value is None else value}, but it is a "
                    f"list; write 'hydra.launcher.{name}=[{item}]'"
                )
        for name in ("resources", "options"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise InputError(
                    f"hydra.launcher.{name} is {'null' if value is None else value}, but it is a "
                    f"mapping; set its values one by one, as in hydra.launcher.{name}.NAME=VALUE"
                )
        for name, value in self.options.items():
            if name.replace("_", "-") in _RESERVED and value is not None:
                raise InputError(
                    f"hydra.launcher.options.{name} is {value}, but the launcher sets this option; "
                    "leave it out"
                )

    def submit(self, workload: Workload) -> int:
        """Submit the tasks that are neither done nor in the queue.

        Returns:
            The number of submitted tasks.

        Raises:
            InputError: SLURM refuses a job, or the limit of jobs is reached in between.
        """
        if not is_shared(workload.root):
            raise InputError(
                f"root is {workload.root}, but {file_system(workload.root)} is not visible to other "
                "nodes; name a folder on a shared file system"
            )
        tasks = list(workload.tasks())
        resources = {
            task.name: Resources.of(
                self.resources, task.resources, key=f"resources.{task.name.partition('-')[0]}"
            )
            for task in tasks
        }
        for distinct in dict.fromkeys(resources.values()):
            # SLURM may send the signal a minute early.
            if self.warn_seconds > 30 * distinct.minutes:
                raise InputError(
                    f"hydra.launcher.warn_seconds is {self.warn_seconds}, but it is at most half "
                    f"of the time limit of {distinct.minutes} minutes; lower it, or raise "
                    "hydra.launcher.resources.minutes"
                )
            queue.check(self.flags(distinct))
        kind, host = file_system(workload.root), socket.gethostname()
        if kind in _DISKS and queue.hosts() - {host, host.partition(".")[0]}:
            logger.warning(
                "root is %s, on a disk of this machine (%s); runs fail on nodes that do not see it: "
                "check one with widthopt doctor --job %s",
                workload.root, kind, root_option(workload.root),
            )  # fmt: skip
        with _submission_lock(workload.root):
            live = queue.live_jobs()
            _adopt(workload.root)
            waiting = {task.name: job for task in tasks if (job := workload.job(task.name)) in live}
            # Jobs of another submitter may have finished since the sweep was planned.
            done = {task.name for task in tasks if workload.is_done(task.name)}
            todo = [
                replace(task, needs=tuple(need for need in task.needs if need not in done))
                for task in tasks
                if task.name not in waiting and task.name not in done
            ]
            if not todo:
                return 0
            specs = {task.name: workload.write_spec(task.name) for task in todo}
            code = snapshot(self.packages, self.code, into=workload.root / "code")
            sender = _Sender(self, workload, code, specs, min(queue.array_size(), 1000))
            sender.send(todo, resources, waiting)
        return len(todo)

    def flags(self, resources: Resources, **more: str) -> dict[str, str]:
        """Return the options of ``sbatch`` for these resources."""
        flags = {
            "time": str(resources.minutes),
            "nodes": str(resources.nodes),
            "ntasks-per-node": str(resources.tasks_per_node),
            "cpus-per-task": str(resources.cpus_per_task),
            "kill-on-invalid-dep": "yes",
            "signal": f"USR2@{self.warn_seconds}",
        }
        flags["requeue" if self.requeue else "no-requeue"] = ""
        if resources.memory_gb is not None:
            flags["mem"] = f"{round(resources.memory_gb * 1024)}M"
        if resources.gpus_per_node and self.gpus_as == "gres":
            flags["gres"] = f"gpu:{resources.gpus_per_node}"
        elif resources.gpus_per_node and self.gpus_as == "gpus-per-node":
            flags["gpus-per-node"] = str(resources.gpus_per_node)
        for key, value in self.options.items():
            if value is not None and value is not False:
                flags[key.replace("_", "-")] = "" if value is True else str(value)
        return {**flags, **more}


def adopt(root: Path) -> None:
    """Record jobs whose submitter was killed before it could, unless one submits now."""
    if any((root / "submissions").glob("*.json")):
        with suppress(BlockingIOError), _submission_lock(root, wait=False):
            _adopt(root)


def _adopt(root: Path) -> None:
    """Record the jobs of submitters that were killed before they could record them.

    Jobs without an order file fail within a minute, and the next command submits them again.
    """
    for path in sorted((root / "submissions").glob("*.json")):
        intent = json.loads(path.read_text("utf-8"))
        for index, job in queue.array_elements(intent["name"]).items():
            log = f"jobs/{intent['name']}/{job}"
            content = {"job": job, "code": intent["code"], "log": log}
            folder = root / "stages" / intent["runs"][index]
            write_atomically(folder / "submission.json", json.dumps(content, indent=2) + "\n")
        path.unlink()


class _LimitReachedError(InputError):
    """A limit on the number of jobs is reached."""


class _Sender:
    """Submits tasks in as few arrays as SLURM's dependencies allow."""

    def __init__(
        self, slurm: Slurm, workload: Workload, code: Path, specs: Mapping[str, Path], limit: int
    ) -> None:
        self._slurm, self._workload, self._specs, self._limit = slurm, workload, specs, limit
        self._code = code.resolve()
        self._jobs: dict[str, str] = {}
        self._sent = 0

    def send(
        self, todo: Sequence[Task], resources: Mapping[str, Resources], waiting: Mapping[str, str]
    ) -> None:
        """Submit all tasks, those without needs first, in the given order.

        Args:
            todo: The tasks, each after the tasks that it needs.
            resources: The resources of each task.
            waiting: The jobs of tasks that are already in the queue.
        """
        self._jobs = dict(waiting)
        followers: dict[str, int] = {}
        for task in todo:
            for need in task.needs:
                followers[need] = followers.get(need, 0) + 1
        rest = list(todo)
        while rest:
            ready = [
                task for task in rest if not any(need not in self._jobs for need in task.needs)
            ]
            assert ready, "tasks need one another"
            names = {task.name for task in ready}
            # Tasks with the most followers come first in an array. So the n-th followers of its
            # elements follow the first elements, and form one array with the same indices.
            ready.sort(key=lambda task: -followers.get(task.name, 0))
            self._send_ready(ready, resources)
            rest = [task for task in rest if task.name not in names]

    def _send_ready(self, ready: Sequence[Task], resources: Mapping[str, Resources]) -> None:
        groups: dict[tuple[Resources, tuple[str, ...]], list[Task]] = {}
        for task in self._send_alongside(ready, resources):
            jobs = tuple(sorted({self._jobs[need] for need in task.needs}))
            groups.setdefault((resources[task.name], jobs), []).append(task)
        for (shared, jobs), tasks in groups.items():
            after = "afterok:" + ":".join(jobs) if jobs else ""
            for first in range(0, len(tasks), self._limit):
                self._send_array(tasks[first : first + self._limit], shared, after)

    def _send_alongside(
        self, ready: Sequence[Task], resources: Mapping[str, Resources]
    ) -> Sequence[Task]:
        """Submit the tasks that follow an array element by element, and return the other tasks.

        With ``aftercorr`` each element waits for the element of the same index only. So a thousand
        dependencies are one submission.
        """
        lines: dict[tuple[str, Resources], dict[int, list[Task]]] = {}
        left = []
        for task in ready:
            jobs = [self._jobs[need] for need in task.needs]
            array, _, index = jobs[0].partition("_") if len(jobs) == 1 else ("", "", "")
            if index:
                line = lines.setdefault((array, resources[task.name]), {})
                line.setdefault(int(index), []).append(task)
            else:
                left.append(task)
        for (array, shared), line in lines.items():
            while line.get(0) and line.get(1):
                size = 0
                while line.get(size):
                    size += 1
                tasks = [line[index].pop(0) for index in range(size)]
                self._send_array(tasks, shared, f"aftercorr:{array}")
            left += [task for tasks in line.values() for task in tasks]
        return left

    def _send_array(self, tasks: Sequence[Task], resources: Resources, after: str) -> None:
        """Submit an array, in halves if a limit of the user or account does not allow all of it.

        Raises:
            InputError: SLURM refuses it, or the limit is reached.
        """
        try:
            self._sbatch(tasks, resources, after)
        except _LimitReachedError:
            half = len(tasks) // 2
            if not half:
                raise
            self._send_array(tasks[:half], resources, after)
            if after.startswith("aftercorr:"):  # the first half has the same indices
                for task in tasks[half:]:
                    jobs = ":".join(self._jobs[need] for need in task.needs)
                    self._send_array([task], resources, f"afterok:{jobs}")
            else:
                self._send_array(tasks[half:], resources, after)

    def _sbatch(self, tasks: Sequence[Task], resources: Resources, after: str) -> None:
        """Submit a job, or an array of jobs.

        Raises:
            InputError: SLURM refuses it.
        """
        # Hydra imports every module below hydra_plugins when it starts, this one too.
        import submitit  # noqa: PLC0415

        slurm, root = self._slurm, self._workload.root
        name = f"widthopt-{uuid.uuid4().hex[:10]}"
        intent = root / "submissions" / f"{name}.json"
        with writing(intent.parent):
            intent.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "name": name, "runs": [task.name for task in tasks], "code": self._code.name,
        }  # fmt: skip
        write_atomically(intent, json.dumps(content) + "\n")
        executor = submitit.SlurmExecutor(
            folder=root.resolve() / "jobs" / name,
            max_num_timeout=0,
            python=f"{_IGNORE_SIGUSR2} {slurm.python or shlex.quote(sys.executable)}",
        )
        flags = slurm.flags(resources, **({"dependency": after} if after else {}))
        executor.update_parameters(
            job_name=name,
            time=resources.minutes,
            nodes=resources.nodes,
            ntasks_per_node=resources.tasks_per_node,
            cpus_per_task=resources.cpus_per_task,
            array_parallelism=slurm.parallelism,
            setup=list(slurm.setup),
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}"],
            additional_parameters={key: value or True for key, value in flags.items()},
        )
        home = os.getcwd()  # noqa: PTH109 (with symbolic links kept)
        orders = [
            Order(
                spec=str(self._specs[task.name].resolve()),
                run_spec=slurm.run_spec,
                home=home,
                requeue=slurm.requeue,
                max_requeues=slurm.max_requeues,
            )
            for task in tasks
        ]
        try:
            with _clean_environment({"job-name": name, **flags}), chdir(self._code):
                jobs = executor.map_array(run_order, orders)
        except submitit.core.utils.FailedJobError as error:
            intent.unlink()
            # AssocMaxSubmitJobLimit, QOSGrpSubmitJobsLimit and others
            limit_reached = "SubmitJob" in str(error)
            raise (_LimitReachedError if limit_reached else InputError)(
                f"sbatch is given {' '.join(queue.to_arguments(flags))}, but SLURM refuses it "
                f"({queue.error_text(str(error))}); {self._sent} runs were submitted before, and the "
                "same command sends the rest"
            ) from error
        self._sent += len(tasks)
        for task, job in zip(tasks, jobs, strict=True):
            self._jobs[task.name] = job.job_id
            log = f"jobs/{name}/{job.job_id}"
            self._workload.record_job(task.name, job.job_id, code=self._code.name, log=log)
        intent.unlink()
        logger.debug("%s: %d runs as %s %s", name, len(tasks), jobs[0].job_id, after)


def file_system(folder: Path) -> str:
    """Return the type of the file system of a folder, which need not exist."""
    mount = ("", "unknown")
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text("utf-8").splitlines():
            _, place, kind = line.split()[:3]
            if folder.resolve().is_relative_to(place) and len(place) >= len(mount[0]):
                mount = (place, kind)
    return mount[1]


def is_shared(folder: Path) -> bool:
    """Return whether other nodes can see a folder, judged by its file system."""
    return file_system(folder) not in _LOCAL


def explain_endings(root: Path, jobs: Collection[str]) -> dict[str, str]:
    """Return how jobs ended, as far as SLURM still knows, by job.

    Args:
        root: The folder of runs. A failed job that wrote nothing to it did not see it.
        jobs: Names of jobs that are no longer in the queue.
    """
    endings = queue.job_endings(jobs)
    # Logs are named JOB_RANK_log.out.
    seen = {path.name.rpartition("_log.")[0] for path in root.glob("jobs/*/*_0_log.*")}
    for job, ending in endings.items():
        if "FAILED" in ending and f"{job}_0" not in seen:
            endings[job] = (
                f"no node has written to {root}, which must be on a file system that nodes see "
                f"({ending})"
            )
    return endings


@contextmanager
def _submission_lock(root: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock under which only one process submits.

    Raises:
        BlockingIOError: Another process submits, and ``wait`` is False.
    """
    with writing(root):
        lock = os.open(root / "submit.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing(root):  # some file systems have no locks
            free = _try_lock(lock)
        if not free:
            if not wait:
                raise BlockingIOError
            logger.warning("another process submits from %s; waiting for it", root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _try_lock(file: int) -> bool:
    """Whether a lock could be had at once; if so, it is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _clean_environment(flags: Iterable[str]) -> Iterator[None]:
    """Remove variables of an enclosing job, and those that would override the batch file.

    Variables that name the cluster stay, and so do a user's settings for other options of
    ``sbatch``.

    Args:
        flags: Names of the options in the batch file.
    """
    overriding = {
        f"SBATCH_{_VARIABLES.get(flag, flag).upper().replace('-', '_')}"
        for flag in (*flags, *_RESERVED)
    }
    removed = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(_ENCLOSING) and name not in _KEPT)
        or name in _RANKS
        or name in overriding
    }
    try:
        yield
    finally:
        os.environ.update(removed)


def watch(workload: Workload) -> None:
    """Wait until no job of this sweep is in the queue, and show the progress.

    Raises:
        Failed: A task is not done.
    """
    tasks = list(workload.tasks())
    with Progress(tasks) as progress:
        active = {task.name: task for task in tasks}
        started: set[str] = set()
        is_silent = False
        while active:
            try:
                live = queue.live_jobs()
                is_silent = False
            except InputError as error:  # the jobs continue without the controller
                level = logging.DEBUG if is_silent else logging.WARNING
                logger.log(level, "%s; trying again", error)
                is_silent = True
                time.sleep(POLL_SECONDS)
                continue
            for name, task in list(active.items()):
                job = workload.job(name)
                if live.get(job, "").startswith("RUNNING") and name not in started:
                    started.add(name)
                    progress.start(task)
                if job in live:
                    continue
                del active[name]
                if name not in started:
                    progress.start(task)
                if workload.is_done(name):
                    progress.finish(task)
                else:
                    progress.fail(
                        task,
                        workload.failure(name)
                        or explain_endings(workload.root, [job]).get(job, ""),
                    )
            progress.tick()
            if active:
                time.sleep(POLL_SECONDS)
    if progress.failed:
        raise Failed(
            f"{progress.done} of {len(tasks)} runs are done and {progress.failed} are not; the "
            "same command tries them again"
        )
