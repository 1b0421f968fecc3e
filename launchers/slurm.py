"""Sweeps on a SLURM cluster, through submitit: each run a job, searches before trainings.

All is planned, frozen and checked before the first ``sbatch``; then runs are submitted as
arrays, and the command ends. Who gives it again submits what is missing: which jobs live is
SLURM's to say, and which runs are done the files'.
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
from contextlib import contextmanager, suppress
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
"""Time between two looks at the queue where the command waits for the end."""

_ENCLOSING = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_OURS = (
    "job-name", "array", "dependency", "signal", "output", "error", "open-mode", "requeue",
    "no-requeue", "wait", "parsable", "test-only", "wrap",
)  # fmt: skip
"""Options of ``sbatch`` that the launcher sets itself, or that would change what it answers."""

_VARIABLES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX"}
"""What ``sbatch`` calls its variables, where that is not the option's name."""

_UNSHARED = {"tmpfs", "ramfs", "devtmpfs"}
_DISKS = {"btrfs", "ext2", "ext3", "ext4", "overlay", "xfs", "zfs"}
"""What a machine has on disks of its own; the others see it if it is exported to them."""

_UNWARNED = """bash -c 'trap "" USR2; exec "$@"' bash"""
"""Starts a command that a warning does not end: Python needs seconds until it can take one."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one run asks for.

    Attributes:
        minutes: Time limit.
        nodes: Nodes.
        tasks_per_node: Processes on each of them; they train together.
        gpus_per_node: Accelerators of each node.
        cpus_per_task: Processors of each process.
        memory_gb: Memory of each node; SLURM's default if None.
    """

    minutes: int
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    memory_gb: float | None

    @classmethod
    def of(cls, values: Mapping[str, Any], changed: Mapping[str, Any], *, key: str) -> "Resources":
        """From plain values, some of them changed.

        Args:
            values: The launcher's.
            changed: Those of one run that differ.
            key: Where the changed ones stand, for messages.

        Raises:
            InputError: A name is unknown, or a value is out of range.
        """
        for name in changed:
            if name not in values:
                raise InputError(
                    f"{key}.{name} is no key, but resources are {', '.join(values)}; correct it"
                )
        merged = {**values, **changed}
        for name, value in merged.items():
            least = 0 if name in {"gpus_per_node", "memory_gb"} else 1
            whole = isinstance(value, int) or (name == "memory_gb" and isinstance(value, float))
            if value is None and name == "memory_gb":
                continue
            if not whole or isinstance(value, bool) or value < least:
                where = key if name in changed else "hydra.launcher.resources"
                raise InputError(
                    f"{where}.{name} is {value}, but it is a number from {least} up; correct it"
                )
        return cls(**merged)


@dataclass(frozen=True)
class Slurm:
    """Submits tasks; see ``conf/hydra/launcher/slurm.yaml`` for what the values mean."""

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
                    f"hydra.launcher.{name} is {getattr(self, name)}, but it is a whole number "
                    f"from {least} up; correct it"
                )
        for name in ("setup", "packages", "code"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                one = "" if value is None else f'"{value}"'
                raise InputError(
                    f"hydra.launcher.{name} is {'null' if value is None else value}, but it is a "
                    f"list; write 'hydra.launcher.{name}=[{one}]'"
                )
        for name in ("resources", "options"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise InputError(
                    f"hydra.launcher.{name} is {'null' if value is None else value}, but it is a "
                    f"table; give its values one by one, as in hydra.launcher.{name}.NAME=VALUE"
                )
        for name, value in self.options.items():
            if name.replace("_", "-") in _OURS and value is not None:
                raise InputError(
                    f"hydra.launcher.options.{name} is {value}, but the launcher sets that itself; "
                    "leave it out"
                )

    def submit(self, workload: Workload) -> int:
        """Submit what is neither done nor in the queue; how many runs that were.

        Raises:
            InputError: SLURM would not take them; or, in the midst of them, no more of them.
        """
        if not is_shared(workload.root):
            raise InputError(
                f"root is {workload.root}, but it is on {file_system(workload.root)}, which no other "
                "node sees; name a folder on a shared file system"
            )
        tasks = list(workload.tasks())
        asked = {
            task.name: Resources.of(
                self.resources, task.resources, key=f"resources.{task.name.partition('-')[0]}"
            )
            for task in tasks
        }
        for one in dict.fromkeys(asked.values()):
            # SLURM itself may warn a minute early.
            if self.warn_seconds > 30 * one.minutes:
                raise InputError(
                    f"hydra.launcher.warn_seconds is {self.warn_seconds}, but of a time limit of "
                    f"{one.minutes} minutes it is half at most; lower it, or raise "
                    "hydra.launcher.resources.minutes"
                )
            queue.check(self.flags(one))
        kind, here = file_system(workload.root), socket.gethostname()
        if kind in _DISKS and queue.hosts() - {here, here.partition(".")[0]}:
            logger.warning(
                "root is %s, on a disk of this machine (%s); on nodes that do not see it runs "
                "fail: widthopt doctor --job %s asks one",
                workload.root, kind, root_option(workload.root),
            )  # fmt: skip
        with _submission_lock(workload.root):
            live = queue.live_jobs()
            _adopt(workload.root)
            waiting = {task.name: job for task in tasks if (job := workload.job(task.name)) in live}
            # Another submitter's jobs may have done some of it since it was planned.
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
            sender.send(todo, asked, waiting)
        return len(todo)

    def flags(self, asked: Resources, **more: str) -> dict[str, str]:
        """Options of ``sbatch`` for these resources."""
        flags = {
            "time": str(asked.minutes),
            "nodes": str(asked.nodes),
            "ntasks-per-node": str(asked.tasks_per_node),
            "cpus-per-task": str(asked.cpus_per_task),
            "kill-on-invalid-dep": "yes",
            "signal": f"USR2@{self.warn_seconds}",
        }
        flags["requeue" if self.requeue else "no-requeue"] = ""
        if asked.memory_gb is not None:
            flags["mem"] = f"{round(asked.memory_gb * 1024)}M"
        if asked.gpus_per_node and self.gpus_as == "gres":
            flags["gres"] = f"gpu:{asked.gpus_per_node}"
        elif asked.gpus_per_node and self.gpus_as == "gpus-per-node":
            flags["gpus-per-node"] = str(asked.gpus_per_node)
        for key, value in self.options.items():
            if value is not None and value is not False:
                flags[key.replace("_", "-")] = "" if value is True else str(value)
        return {**flags, **more}


def adopt(root: Path) -> None:
    """Write down jobs whose submitter was killed before it could, unless one is at work now."""
    if any((root / "submissions").glob("*.json")):
        with suppress(BlockingIOError), _submission_lock(root, wait=False):
            _adopt(root)


def _adopt(root: Path) -> None:
    """Write down what a process submitted that was killed before it could do so.

    Jobs whose order it had not put in place yet fail by themselves within a minute, and are
    submitted again by the next command.
    """
    for path in sorted((root / "submissions").glob("*.json")):
        intent = json.loads(path.read_text("utf-8"))
        for place, job in queue.array_elements(intent["name"]).items():
            log = f"jobs/{intent['name']}/{job}"
            content = {"job": job, "code": intent["code"], "log": log}
            folder = root / "stages" / intent["runs"][place]
            write_atomically(folder / "submission.json", json.dumps(content, indent=2) + "\n")
        path.unlink()


class _LimitReachedError(InputError):
    """No room for more jobs, as a limit on how many there may be says."""


class _Sender:
    """Puts tasks into as few arrays as SLURM's dependencies allow."""

    def __init__(
        self, slurm: Slurm, workload: Workload, code: Path, specs: Mapping[str, Path], limit: int
    ) -> None:
        self._slurm, self._work, self._specs, self._limit = slurm, workload, specs, limit
        self._code = code.resolve()
        self._jobs: dict[str, str] = {}
        self._sent = 0

    def send(
        self, todo: Sequence[Task], asked: Mapping[str, Resources], waiting: Mapping[str, str]
    ) -> None:
        """Submit all of it: what needs nothing first, in the given order.

        Args:
            todo: Items; each comes after what it needs.
            asked: Their resources.
            waiting: The jobs of tasks that are in the queue already.
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
            # Those that most others wait for first: so the n-th followers of an array's elements
            # are those of its first few, and one array of the same numbers.
            ready.sort(key=lambda task: -followers.get(task.name, 0))
            self._send_ready(ready, asked)
            rest = [task for task in rest if task.name not in names]

    def _send_ready(self, ready: Sequence[Task], asked: Mapping[str, Resources]) -> None:
        groups: dict[tuple[Resources, tuple[str, ...]], list[Task]] = {}
        for task in self._send_alongside(ready, asked):
            jobs = tuple(sorted({self._jobs[need] for need in task.needs}))
            groups.setdefault((asked[task.name], jobs), []).append(task)
        for (resources, jobs), tasks in groups.items():
            after = "afterok:" + ":".join(jobs) if jobs else ""
            for first in range(0, len(tasks), self._limit):
                self._send_array(tasks[first : first + self._limit], resources, after)

    def _send_alongside(
        self, ready: Sequence[Task], asked: Mapping[str, Resources]
    ) -> Sequence[Task]:
        """Submit what follows an array element by element; what is left over.

        ``aftercorr`` lets each element wait for the one of the same number alone, as
        ``afterok`` does for a job, so that a thousand dependencies are one submission.
        """
        lines: dict[tuple[str, Resources], dict[int, list[Task]]] = {}
        left = []
        for task in ready:
            jobs = [self._jobs[need] for need in task.needs]
            array, _, index = jobs[0].partition("_") if len(jobs) == 1 else ("", "", "")
            if index:
                line = lines.setdefault((array, asked[task.name]), {})
                line.setdefault(int(index), []).append(task)
            else:
                left.append(task)
        for (array, resources), line in lines.items():
            while line.get(0) and line.get(1):
                places = 0
                while line.get(places):
                    places += 1
                tasks = [line[place].pop(0) for place in range(places)]
                self._send_array(tasks, resources, f"aftercorr:{array}")
            left += [task for tasks in line.values() for task in tasks]
        return left

    def _send_array(self, tasks: Sequence[Task], resources: Resources, after: str) -> None:
        """One array, or a shorter one if a user's or an account's limit leaves no room for it.

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
            if after.startswith("aftercorr:"):  # those of the same number are sent, and only those
                for task in tasks[half:]:
                    jobs = ":".join(self._jobs[need] for need in task.needs)
                    self._send_array([task], resources, f"afterok:{jobs}")
            else:
                self._send_array(tasks[half:], resources, after)

    def _sbatch(self, tasks: Sequence[Task], resources: Resources, after: str) -> None:
        """One submission: a job, or an array of them.

        Raises:
            InputError: SLURM refuses it.
        """
        # Hydra imports every module below hydra_plugins when it starts, this one too.
        import submitit  # noqa: PLC0415

        slurm, root = self._slurm, self._work.root
        name = f"widthopt-{uuid.uuid4().hex[:10]}"
        intent = root / "submissions" / f"{name}.json"
        with writing(intent.parent):
            intent.parent.mkdir(parents=True, exist_ok=True)
        runs = [task.name for task in tasks]
        written = {"name": name, "runs": runs, "code": self._code.name}
        write_atomically(intent, json.dumps(written) + "\n")
        executor = submitit.SlurmExecutor(
            folder=root.resolve() / "jobs" / name,
            max_num_timeout=0,
            python=f"{_UNWARNED} {slurm.python or shlex.quote(sys.executable)}",
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
        home = os.getcwd()  # noqa: PTH109 (as the user sees it)
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
            with _clean_environment({"job-name": name, **flags}), _inside(self._code):
                jobs = executor.map_array(run_order, orders)
        except submitit.core.utils.FailedJobError as error:
            intent.unlink()
            full = "SubmitJob" in str(error)  # as in AssocMaxSubmitJobLimit, QOSGrpSubmitJobsLimit
            raise (_LimitReachedError if full else InputError)(
                f"sbatch is given {' '.join(queue.words_for(flags))}, but SLURM refuses it "
                f"({queue.words_of(str(error))}); {self._sent} runs were submitted before, and the "
                "same command sends the rest"
            ) from error
        self._sent += len(tasks)
        for task, job in zip(tasks, jobs, strict=True):
            self._jobs[task.name] = job.job_id
            log = f"jobs/{name}/{job.job_id}"
            self._work.record_job(task.name, job.job_id, code=self._code.name, log=log)
        intent.unlink()
        logger.debug("%s: %d runs as %s %s", name, len(tasks), jobs[0].job_id, after)


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, or that it would be made on."""
    found = ("", "unknown")
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text("utf-8").splitlines():
            _, place, kind = line.split()[:3]
            if folder.resolve().is_relative_to(place) and len(place) >= len(found[0]):
                found = (place, kind)
    return found[1]


def is_shared(folder: Path) -> bool:
    """Whether other nodes can see a folder, as far as its kind of file system says."""
    return file_system(folder) not in _UNSHARED


def explain_endings(root: Path, jobs: Collection[str]) -> dict[str, str]:
    """How jobs ended that do not live any more, as far as SLURM still knows; by job.

    Args:
        root: The folder that they were to write to; a job that failed without has not seen it.
        jobs: As SLURM calls them.
    """
    found = queue.job_endings(jobs)
    # Logs are called JOB_RANK_log.out.
    seen = {path.name.rpartition("_log.")[0] for path in root.glob("jobs/*/*_0_log.*")}
    for job, said in found.items():
        if "FAILED" in said and f"{job}_0" not in seen:
            found[job] = (
                f"no node has written to {root}, which has to be on a file system that nodes see "
                f"({said})"
            )
    return found


@contextmanager
def _submission_lock(root: Path, *, wait: bool = True) -> Iterator[None]:
    """Submit alone: another process that wants to waits until this one has left.

    Raises:
        BlockingIOError: Another one submits, and ``wait`` is off.
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
    """Leave out what belongs to an enclosing job, but nothing that says where the cluster is.

    Nor a person's own settings for ``sbatch``, but those that would go before what it is given in
    its file.

    Args:
        flags: The names of the options that are given.
    """
    given = {
        f"SBATCH_{_VARIABLES.get(one, one).upper().replace('-', '_')}" for one in (*flags, *_OURS)
    }
    taken = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(_ENCLOSING) and name not in _KEPT) or name in _RANKS or name in given
    }
    try:
        yield
    finally:
        os.environ.update(taken)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Be in another folder: jobs start there, and Python looks there first."""
    before = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def watch(workload: Workload) -> None:
    """Wait until nothing of this sweep lives any more, and say how it ended.

    Raises:
        Failed: Not all of it is done.
    """
    tasks = list(workload.tasks())
    with Progress(tasks) as progress:
        going = {task.name: task for task in tasks}
        started: set[str] = set()
        away = False
        while going:
            try:
                live = queue.live_jobs()
                away = False
            except InputError as error:  # its jobs go on, and so does this
                logger.log(logging.DEBUG if away else logging.WARNING, "%s; asking again", error)
                away = True
                time.sleep(POLL_SECONDS)
                continue
            for name, task in list(going.items()):
                job = workload.job(name)
                if live.get(job, "").startswith("RUNNING") and name not in started:
                    started.add(name)
                    progress.start(task)
                if job in live:
                    continue
                del going[name]
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
            if going:
                time.sleep(POLL_SECONDS)
    if progress.failed:
        raise Failed(
            f"{progress.done} of {len(tasks)} runs are done and {progress.failed} are not; the "
            "same command tries them again"
        )
