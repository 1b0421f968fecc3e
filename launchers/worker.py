"""One process of a SLURM job, and how it stops.

submitit calls `run_order` in every process of the job. SLURM sends SIGUSR2 before it preempts a
job or the time limit is reached. The process treats the signal as Ctrl-C: a training stops after
its current step and saves its state. Then rank 0 requeues the job, and all processes wait to be
ended. Outside of a training there is nothing to save, and any process requeues the job.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType

from hydra_plugins.widthopt_launchers.snapshot import OWN
from widthopt.errors import InputError
from widthopt.runs.states import current_job


logger = logging.getLogger("widthopt")

_COPY = Path(__file__).parents[2]
"""The copy of the code that the job runs from; see `hydra_plugins.widthopt_launchers.snapshot`."""

STOPPED = 75
"""Exit code of a job that was stopped and not requeued (EX_TEMPFAIL)."""

GRACE_SECONDS = 3600
"""How long processes wait to be ended after a requeue; SLURM needs seconds."""

FIRST_SECONDS = 5
"""How long other ranks wait for rank 0 where it has nothing to save."""


@dataclass(frozen=True, slots=True)
class Order:
    """The task of a job's processes.

    Attributes:
        spec: Path of the task's spec.
        run_spec: Dotted name of the function that runs a spec.
        home: The folder that relative paths in the spec start from.
        requeue: Whether the job may be requeued.
        max_requeues: The largest number of requeues.
    """

    spec: str
    run_spec: str
    home: str
    requeue: bool
    max_requeues: int


def run_order(order: Order) -> None:
    """Run the task; the exit code of the process is 0 if it is done.

    Raises:
        Exception: The task failed; SLURM then marks the job as failed.
    """
    warning = _Warning()
    rank = _set_ranks()
    try:
        _run(order, Path(order.spec), rank)
        _ignore_warning()  # the task is done
    except BaseException as error:
        if warning.received:
            # A training that has saved its state raises an exception of its own.
            _requeue(order, rank, saving=not isinstance(error, KeyboardInterrupt))
        if isinstance(error, InputError):
            sys.stderr.write(f"widthopt: {error}\n")
            sys.exit(2)
        raise


def _run(order: Order, spec: Path, rank: int) -> None:
    os.chdir(order.home)
    _redirect_output(spec.parent / (f"log-{rank}.txt" if rank else "log.txt"))
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if rank == 0:
        _record_attempt(spec.parent / "attempts.jsonl", restarts)
    if restarts > order.max_requeues:
        sys.exit(
            f"widthopt: hydra.launcher.max_requeues is {order.max_requeues}, but this job was "
            f"requeued {restarts} times; start the same sweep again"
        )
    sys.path.append(str(_COPY / OWN))
    module, _, name = order.run_spec.rpartition(".")
    getattr(import_module(module), name)(spec)


def _set_ranks() -> int:
    """Set the variables of torchrun from those of SLURM, and return the rank."""
    variables = {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}
    for name, slurm in variables.items():
        os.environ[name] = os.environ.get(f"SLURM_{slurm}", "1" if name == "WORLD_SIZE" else "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # set by an enclosing job
        os.environ.pop(name, None)
    return int(os.environ["RANK"])


def _redirect_output(log: Path) -> None:
    """Redirect the output of this process to a file of the task."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout.write(
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}, job {current_job()}, host {socket.gethostname()}, "
        f"process {os.getpid()}\n"
    )
    sys.stdout.flush()


def _record_attempt(path: Path, restarts: int) -> None:
    """Append a line about this attempt."""
    line = {
        "job": current_job(),
        "restart": restarts,
        "host": socket.gethostname(),
        "time": time.time(),
        "code": _COPY.name,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class _Warning:
    """Handler that raises SIGINT at SLURM's first warning, in this process but not in its forks."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR2, self._handle)
        # SLURM signals every process of the job, data loading workers too.
        os.register_at_fork(after_in_child=_ignore_warning)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self.received = True
        signal.raise_signal(signal.SIGINT)


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _requeue(order: Order, rank: int, *, saving: bool) -> None:
    """Requeue the job and wait to be ended. This function does not return.

    Args:
        order: The task.
        rank: The rank of this process.
        saving: Whether all ranks agreed to stop, so that rank 0 saves the state.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank:
        # Rank 0 requeues the job, which ends all ranks. But it may be waiting for this rank in a
        # collective call that no signal interrupts.
        time.sleep(GRACE_SECONDS if saving else FIRST_SECONDS)
    if order.requeue:
        job = current_job()
        try:
            command = ["scontrol", "requeue", job]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            # Another rank may have requeued the job already; then it is pending.
            requeued = not done.returncode or "pending" in done.stderr
            reason = "" if requeued else done.stderr.strip()
        except FileNotFoundError:  # a container without SLURM's commands
            reason = "there is no scontrol where it runs"
        if not reason:
            sys.stdout.write(f"stopped; job {job} is requeued and will resume\n")
            sys.stdout.flush()
            time.sleep(GRACE_SECONDS)
        sys.stderr.write(
            f"widthopt: job {job} could not be requeued ({reason}); start the same sweep again\n"
        )
    else:
        sys.stderr.write("widthopt: stopped before its end; start the same sweep again\n")
    sys.stderr.flush()
    os._exit(STOPPED)
