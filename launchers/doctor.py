"""Checks of a site: what sweeps need of this machine, of SLURM, and of the nodes behind it."""

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
"""How long the job that looks at a node may take, most of it waiting for one."""

_COMMANDS = ("sbatch", "squeue", "srun", "scancel", "scontrol")
_SKEW_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: What was looked at.
        well: Whether it is as it has to be.
        said: What was found, and what to do if it is not well.
    """

    what: str
    well: bool
    said: str


def _well(what: str, said: str) -> Check:
    return Check(what, well=True, said=said)


def _badly(what: str, said: str) -> Check:
    return Check(what, well=False, said=said)


def checks(root: Path, options: Mapping[str, Any], *, device: str, job: bool) -> Iterator[Check]:
    """Look at a site.

    Args:
        root: The folder that runs are to be kept in.
        options: Those of one of SLURM's launchers, as ``conf/hydra/launcher`` has them.
        device: What runs are to compute on, as ``runtime.device`` has it.
        job: Whether to send a job that looks at a node.
    """
    yield _well("python", f"{sys.version.split()[0]}, {sys.executable}")
    yield from _folder(root)
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        yield _badly("SLURM", f"there is no {', '.join(missing)}; start on a login node")
        return
    try:
        release = queue.query("sbatch", "--version").strip()
        live = len(queue.live_jobs())
    except InputError as error:
        yield _badly("SLURM", str(error))
        return
    yield _well("SLURM", f"{release}; {live} jobs of yours")
    yield _well("arrays", f"up to {queue.array_size()} runs in one")
    try:
        queue.query("sacct", "-X", "-n", "-P", "-o", "JobID", "-S", "now-1minutes")
        yield _well("accounting", "there; it tells how jobs ended")
    except InputError:
        yield _well("accounting", "none; states come from the runs' own files all the same")
    slurm = Slurm(**{key: one for key, one in options.items() if key != "wait"})
    try:
        queue.check(slurm.flags(Resources.of(slurm.resources, {}, key="resources")))
        yield _well("options", "SLURM would take a job like these")
    except InputError as error:
        yield _badly("options", str(error))
        return
    if job:
        yield from _node(root, options, device)


def _folder(root: Path) -> Iterator[Check]:
    """The folder: there, writable, shared, with locks and room."""
    try:
        check_writable(root)
    except InputError as error:
        yield _badly("root", str(error))
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
                    yield _badly("locks", "a lock keeps nobody out; mount with locks")
                except BlockingIOError:
                    yield _well("locks", "work on this machine")
        except OSError as error:
            yield _badly("locks", f"there are none ({error.strerror}); mount with locks")
    free = shutil.disk_usage(root).free / 2**30
    yield Check("room", free > 1, f"{free:,.0f} GiB free")


class _Probe:
    """One job that looks at the node it gets; see `Workload`."""

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
        return [Task("doctor", "a look at a node", (), 0.0)]

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
        return (self.folder / "found.json").exists()

    def failure(self, name: str) -> str:
        """See `Workload`."""
        del name
        return ""

    def end(self) -> None:
        """See `Workload`."""


_ASK_TORCH = "import torch; print(torch.__version__, torch.accelerator.device_count())"


def probe(spec: Path) -> None:
    """Look at the node that this job got, and write down what is there."""
    if os.environ.get("RANK", "0") != "0":
        return
    asked = subprocess.run(  # noqa: S603 (our own words)
        [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, check=True
    )
    torch, gpus = asked.stdout.split()[-2:]
    found: dict[str, Any] = {
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
            found["locked"] = False
        except OSError:
            found["locked"] = True
    write_atomically(spec.parent / "found.json", json.dumps(found))


def _accelerators(asked: int, found: Mapping[str, Any], device: str) -> Iterator[Check]:
    """Whether torch sees as many accelerators on a node as each was asked for."""
    if asked and device == "cpu":
        yield _well("GPUs", "not looked for, since runtime.device is cpu")
    elif asked:
        well = found["gpus"] >= asked
        said = (
            f"torch {found['torch']} sees {found['gpus']} of the {asked} that each node is to give"
        )
        yield Check("GPUs", well, said if well else
            f"{said}; see hydra.launcher.gpus_as and setup, install a torch for them, or use "
            "runtime.device=cpu",
        )  # fmt: skip


def _node(root: Path, options: Mapping[str, Any], device: str) -> Iterator[Check]:
    """What a job finds on a node."""
    own = Path(tempfile.mkdtemp(prefix=".doctor.", dir=root))
    workload = _Probe(own)
    workload.folder.mkdir(parents=True)
    values = {key: one for key, one in options.items() if key != "wait"}
    slurm = Slurm(**{**values, "run_spec": "hydra_plugins.widthopt_launchers.doctor.probe"})
    try:
        with (workload.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            slurm.submit(workload)
            until = time.monotonic() + PROBE_SECONDS
            while not workload.is_done("doctor") and time.monotonic() < until:
                if workload.job("doctor") not in queue.live_jobs() and not workload.is_done(
                    "doctor"
                ):
                    break
                time.sleep(0.5)
            if not workload.is_done("doctor"):
                job = workload.job("doctor")
                why = queue.live_jobs().get(job) or explain_endings(own, [job]).get(
                    job, "it left no word"
                )
                queue.cancel([job])
                said = f"job {job} did not look at a node ({why}); see the files in {own}"
                yield _badly("node", said)
                return
        found = json.loads((workload.folder / "found.json").read_text("utf-8"))
        skew = abs(found["time"] - (workload.folder / "found.json").stat().st_mtime)
        yield _well("node",
            f"{found['host']}: python {found['python']}, torch {found['torch']}, "
            f"{found['gpus']} GPUs, {found['processes']} processes",
        )  # fmt: skip
        yield from _accelerators(slurm.resources["gpus_per_node"], found, device)
        yield Check(
            "locks of nodes", found["locked"],
            "a node sees the locks of this machine" if found["locked"] else
            "a node does not see the locks of this machine; submit from one machine at a time",
        )  # fmt: skip
        yield Check("clocks", skew < _SKEW_SECONDS, f"{skew:.1f} s apart, the node and the files")
        shutil.rmtree(own, ignore_errors=True)
    except InputError as error:
        yield _badly("node", str(error))
