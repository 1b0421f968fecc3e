"""Checks of a site: the folder of runs, the SLURM commands, and a compute node."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_plugins.widthopt_launchers import queue
from hydra_plugins.widthopt_launchers.slurm import (
    Resources,
    Slurm,
    explain_endings,
    file_system,
    is_shared,
)
from hydra_plugins.widthopt_launchers.workload import Task
from widthopt.errors import InputError
from widthopt.files import check_writable, write_atomically


PROBE_SECONDS = 300
"""Longest time of the job that checks a node; most of it is spent waiting for a node."""

_COMMANDS = ("sbatch", "squeue", "srun", "scancel", "scontrol")
_SKEW_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        passed: Whether the check passed.
        message: What was found, and the remedy if the check failed.
    """

    name: str
    passed: bool
    message: str


def _ok(name: str, message: str) -> Check:
    return Check(name, passed=True, message=message)


def _failed(name: str, message: str) -> Check:
    return Check(name, passed=False, message=message)


def checks(root: Path, options: Mapping[str, Any], *, device: str, job: bool) -> Iterator[Check]:
    """Check a site, and yield the results one by one.

    Args:
        root: The folder of runs.
        options: The values of a SLURM launcher in ``conf/hydra/launcher``.
        device: The value of ``runtime.device``.
        job: Whether to submit a job that checks a node.
    """
    yield _ok("python", f"{sys.version.split()[0]}, {sys.executable}")
    yield from _folder(root)
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        yield _failed("SLURM", f"not found: {', '.join(missing)}; start on a login node")
        return
    try:
        release = queue.query("sbatch", "--version").strip()
        live = len(queue.live_jobs())
    except InputError as error:
        yield _failed("SLURM", str(error))
        return
    yield _ok("SLURM", f"{release}; {live} jobs of yours")
    yield _ok("arrays", f"at most {queue.array_size()} runs in an array")
    try:
        queue.query("sacct", "-X", "-n", "-P", "-o", "JobID", "-S", "now-1minutes")
        yield _ok("accounting", "available; shows how jobs ended")
    except InputError:
        yield _ok("accounting", "not available; states come from the files of the runs")
    slurm = Slurm(**{key: value for key, value in options.items() if key != "wait"})
    try:
        queue.check(slurm.flags(Resources.of(slurm.resources, {}, key="resources")))
        yield _ok("options", "SLURM accepts a job with these options")
    except InputError as error:
        yield _failed("options", str(error))
        return
    if job:
        yield from _node(root, options, device)


def _folder(root: Path) -> Iterator[Check]:
    """Check that the folder is writable and shared, has locks and free space."""
    try:
        check_writable(root)
    except InputError as error:
        yield _failed("root", str(error))
        return
    yield Check("root", is_shared(root), f"{root.resolve()} on {file_system(root)}" + (
        "" if is_shared(root) else
        ", which no other node sees; name a folder on a shared file system"
    ))  # fmt: skip
    with tempfile.NamedTemporaryFile(dir=root, prefix=".lock.") as first:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with Path(first.name).open() as second:
                try:
                    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield _failed(
                        "locks",
                        "a lock does not exclude a second process; mount the file system with locks",
                    )
                except BlockingIOError:
                    yield _ok("locks", "work on this machine")
        except OSError as error:
            yield _failed(
                "locks", f"not supported ({error.strerror}); mount the file system with locks"
            )
    free = shutil.disk_usage(root).free / 2**30
    yield Check("free space", free > 1, f"{free:,.0f} GiB free")


class _Probe:
    """A workload of one job that checks the node it runs on."""

    interruptions = ()
    imports = ()
    name = "doctor"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._job = ""

    @property
    def folder(self) -> Path:
        return self.root / "stages" / "doctor"

    def begin(self, *, assume_yes: bool, live: Collection[str] = ()) -> None:
        """See `Workload`."""

    def tasks(self) -> Sequence[Task]:
        """See `Workload`."""
        return [Task("doctor", "check of a node", (), 0.0)]

    def write_spec(self, name: str) -> Path:
        """See `Workload`."""
        del name
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "spec.json", json.dumps({"lock": "lock"}))
        return self.folder / "spec.json"

    def job(self, name: str) -> str:
        """See `Workload`."""
        del name
        return self._job

    def record_job(self, name: str, job: str, **details: str) -> None:
        """See `Workload`."""
        del name, details
        self._job = job

    def is_done(self, name: str) -> bool:
        """See `Workload`."""
        del name
        return (self.folder / "node.json").exists()

    def failure(self, name: str) -> str:
        """See `Workload`."""
        del name
        return ""

    def end(self) -> None:
        """See `Workload`."""


_TORCH_SCRIPT = "import torch; print(torch.__version__, torch.accelerator.device_count())"


def probe(spec: Path) -> None:
    """Check the node of this job, and write the result beside the spec."""
    if os.environ.get("RANK", "0") != "0":
        return
    output = subprocess.run(  # noqa: S603 (a fixed command)
        [sys.executable, "-c", _TORCH_SCRIPT], capture_output=True, text=True, check=True
    )
    torch, gpus = output.stdout.split()[-2:]
    node: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "torch": torch,
        "gpus": int(gpus),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "time": time.time(),
    }
    with (spec.parent / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            node["locked"] = False
        except OSError:
            node["locked"] = True
    write_atomically(spec.parent / "node.json", json.dumps(node))


def _accelerators(requested: int, node: Mapping[str, Any], device: str) -> Iterator[Check]:
    """Check that torch sees all requested accelerators on a node."""
    if requested and device == "cpu":
        yield _ok("GPUs", "not checked, since runtime.device is cpu")
    elif requested:
        passed = node["gpus"] >= requested
        message = f"torch {node['torch']} sees {node['gpus']} of {requested} requested per node"
        yield Check("GPUs", passed, message if passed else
            f"{message}; see hydra.launcher.gpus_as and setup, install a build of torch for them, "
            "or use runtime.device=cpu",
        )  # fmt: skip


def _node(root: Path, options: Mapping[str, Any], device: str) -> Iterator[Check]:
    """Submit a job and check what it reports about its node."""
    folder = Path(tempfile.mkdtemp(prefix=".doctor.", dir=root))
    workload = _Probe(folder)
    workload.folder.mkdir(parents=True)
    values = {key: value for key, value in options.items() if key != "wait"}
    slurm = Slurm(**{**values, "run_spec": "hydra_plugins.widthopt_launchers.doctor.probe"})
    try:
        with (workload.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            slurm.submit(workload)
            until = time.monotonic() + PROBE_SECONDS
            while not workload.is_done("doctor") and time.monotonic() < until:
                job = workload.job("doctor")
                if job not in queue.live_jobs() and not workload.is_done("doctor"):
                    break
                time.sleep(0.5)
            if not workload.is_done("doctor"):
                job = workload.job("doctor")
                reason = queue.live_jobs().get(job) or explain_endings(folder, [job]).get(job)
                queue.cancel([job])
                reason = reason or "no reason known"
                yield _failed("node", f"job {job} did not run ({reason}); see {folder}")
                return
        node = json.loads((workload.folder / "node.json").read_text("utf-8"))
        skew = abs(node["time"] - (workload.folder / "node.json").stat().st_mtime)
        yield _ok("node",
            f"{node['host']}: python {node['python']}, torch {node['torch']}, "
            f"{node['gpus']} GPUs, {node['processes']} processes",
        )  # fmt: skip
        yield from _accelerators(slurm.resources["gpus_per_node"], node, device)
        yield Check(
            "locks of nodes", node["locked"],
            "a node sees the locks of this machine" if node["locked"] else
            "a node does not see the locks of this machine; submit from one machine at a time",
        )  # fmt: skip
        yield Check(
            "clocks",
            skew < _SKEW_SECONDS,
            f"the clocks of the node and of the files differ by {skew:.1f} s",
        )
        shutil.rmtree(folder, ignore_errors=True)
    except InputError as error:
        yield _failed("node", str(error))
