"""What a job of SLURM's runs: one process of one task, and what it does when it is to stop.

The job's processes all start here (`submitit` calls `run_order`). SLURM warns them by SIGUSR2
before it preempts them or their time is over. That is passed on as Ctrl-C, which a training
takes as the wish to stop after its step with everything saved; then the first process puts
the job back into the queue, and all wait for their end. Outside of a training there is nothing to
save, and whichever process is warned puts the job back.
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
"""Exit code of what was told to stop and could not be put back (EX_TEMPFAIL)."""

GRACE_SECONDS = 3600
"""How long processes wait for their end after a warning; SLURM needs seconds."""

FIRST_SECONDS = 5
"""How long others wait for the first process where it has nothing to save."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a job's processes are to do.

    Attributes:
        spec: The task, as it was frozen.
        run_spec: Dotted name of what does it.
        home: The folder that relative paths in it start from.
        requeue: Whether the job may be put back into the queue.
        max_requeues: How often it may start again before it is given up.
    """

    spec: str
    run_spec: str
    home: str
    requeue: bool
    max_requeues: int


def run_order(order: Order) -> None:
    """Do it; the exit code of the process says how that ended.

    Raises:
        Exception: What went wrong; SLURM then calls the job failed.
    """
    warning = _Warning()
    rank = _take_part()
    try:
        _work(order, Path(order.spec), rank)
        _ignore_warning()  # from here on it would only spoil the end
    except BaseException as error:
        if warning.came:
            # A training that stops in order raises an exception of its own.
            _requeue(order, rank, saving=not isinstance(error, KeyboardInterrupt))
        if isinstance(error, InputError):
            sys.stderr.write(f"widthopt: {error}\n")
            sys.exit(2)
        raise


def _work(order: Order, spec: Path, rank: int) -> None:
    os.chdir(order.home)
    _write_into(spec.parent / (f"log-{rank}.txt" if rank else "log.txt"))
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if rank == 0:
        _note(spec.parent / "attempts.jsonl", restarts)
    if restarts > order.max_requeues:
        sys.exit(f"widthopt: this job was put back {restarts} times, which is too often")
    sys.path.append(str(_COPY / OWN))
    module, _, name = order.run_spec.rpartition(".")
    getattr(import_module(module), name)(spec)


def _take_part() -> int:
    """Say in torchrun's words which process this is of how many; its rank."""
    words = {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}
    for name, slurm in words.items():
        os.environ[name] = os.environ.get(f"SLURM_{slurm}", "1" if name == "WORLD_SIZE" else "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # of an enclosing job
        os.environ.pop(name, None)
    return int(os.environ["RANK"])


def _write_into(log: Path) -> None:
    """Send what this process prints to a file of the task."""
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


def _note(path: Path, restarts: int) -> None:
    """Add a line about this start."""
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
    """Takes SLURM's warning for Ctrl-C, once, in this process but in none that it forks."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR2, self._take)
        # SLURM signals every process of the job, those that load images too.
        os.register_at_fork(after_in_child=_ignore_warning)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self.came = True
        signal.raise_signal(signal.SIGINT)


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _requeue(order: Order, rank: int, *, saving: bool) -> None:
    """Put the job back into the queue and wait for its end; the process ends here.

    Args:
        order: What the job was to do.
        rank: Which of its processes this is.
        saving: Whether the processes agreed to stop, so that the first one has to save.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank:
        # The first process puts the job back, which ends all of them. But it may be waiting for
        # this one, deep inside of a collective call that no signal interrupts.
        time.sleep(GRACE_SECONDS if saving else FIRST_SECONDS)
    if order.requeue:
        job = current_job()
        try:
            command = ["scontrol", "requeue", job]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            # Another process may have put it back already; then it waits by now.
            back = not done.returncode or "pending" in done.stderr
            why = "" if back else done.stderr.strip()
        except FileNotFoundError:  # as in a container that has none of SLURM's commands
            why = "there is no scontrol where it runs"
        if not why:
            sys.stdout.write(f"stopped; job {job} goes on when SLURM has room for it\n")
            sys.stdout.flush()
            time.sleep(GRACE_SECONDS)
        sys.stderr.write(
            f"widthopt: job {job} could not be put back ({why}); give the same sweep again\n"
        )
    else:
        sys.stderr.write("widthopt: stopped before its end; give the same sweep again\n")
    sys.stderr.flush()
    os._exit(STOPPED)
