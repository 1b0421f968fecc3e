"""A pool of processes on this machine, one for each task."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from hydra_plugins.widthopt_launchers.progress import Progress
from hydra_plugins.widthopt_launchers.workload import Task, Workload
from widthopt.errors import InputError


TICK_SECONDS = 0.5
"""Seconds between two updates of the progress while no process ends."""


class Pool:
    """Run tasks in processes, several at a time.

    A fork server imports the modules that tasks need and does nothing else. Processes forked from
    it start within milliseconds and share no state with earlier ones.
    """

    def __init__(self, run_spec: str, *, max_parallel: int, threads: int | None) -> None:
        """Check the options.

        Args:
            run_spec: Dotted name of the function that runs one task, given the path of its spec.
            max_parallel: Number of processes at a time, at least 1.
            threads: Threads of each process; if None, the machine's processors are divided.

        Raises:
            InputError: An option is not a positive integer.
        """
        for name, value in (("max_parallel", max_parallel), ("threads", threads)):
            if (name, value) != ("threads", None) and (not isinstance(value, int) or value < 1):
                raise InputError(
                    f"hydra.launcher.{name} is {value}, but it is an integer of at least 1; "
                    "correct it"
                )
        self._run_spec, self._parallel = run_spec, max_parallel
        processors = len(os.sched_getaffinity(0))
        self._threads = threads or max(1, processors // max_parallel)

    def run(self, workload: Workload, progress: Progress) -> None:
        """Run all tasks of a workload, each after the tasks that it needs.

        Ctrl-C is forwarded to the processes. They save their state, and the pool waits for them.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([self._run_spec.rpartition(".")[0], *workload.imports])
        receiver, sender = multiprocessing.Pipe(duplex=False)
        # Without a safe path the fork server searches the current folder first, where a user may
        # have a random.py. The processes get the sys.path of this one.
        variables = {"OMP_NUM_THREADS": str(self._threads), "PYTHONSAFEPATH": "1"}
        with receiver, sender, _environment(variables):
            self._run(workload, progress, context, receiver)

    def _run(
        self,
        workload: Workload,
        progress: Progress,
        context: multiprocessing.context.ForkServerContext,
        alive: Connection,
    ) -> None:
        waiting = {task.name: task for task in workload.tasks()}
        running: dict[int, tuple[Task, ForkServerProcess]] = {}
        unavailable: set[str] = set()
        try:
            while waiting or running:
                for task in _remove_blocked(waiting, unavailable):
                    progress.block(task)
                for task in self._startable(waiting, running):
                    process = context.Process(
                        target=_child,
                        args=(self._run_spec, workload.write_spec(task.name), alive),
                    )
                    process.start()
                    progress.start(waiting.pop(task.name))
                    running[process.sentinel] = (task, process)
                for sentinel in wait(list(running), timeout=TICK_SECONDS):
                    assert isinstance(sentinel, int)
                    task, process = running.pop(sentinel)
                    process.join()
                    if process.exitcode == 0 and workload.is_done(task.name):
                        progress.finish(task)
                    else:
                        unavailable.add(task.name)
                        progress.fail(
                            task, workload.failure(task.name) or _exit_text(process.exitcode)
                        )
                progress.tick()
        except KeyboardInterrupt:
            for _, process in running.values():
                if process.pid is not None:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGINT)
            for _, process in running.values():
                process.join()
            raise

    def _startable(
        self, waiting: Mapping[str, Task], running: Mapping[int, tuple[Task, ForkServerProcess]]
    ) -> list[Task]:
        """Return the tasks that can start now, at most as many as there are free processes."""
        active = {task.name for task, _ in running.values()}
        ready = [
            task
            for task in waiting.values()
            if not any(need in waiting or need in active for need in task.needs)
        ]
        return ready[: self._parallel - len(running)]


def _remove_blocked(waiting: dict[str, Task], unavailable: set[str]) -> list[Task]:
    """Move tasks that need an unavailable one from ``waiting`` to ``unavailable``.

    Returns:
        The tasks, with those that need them in turn.
    """
    removed: list[Task] = []
    while blocked := [t for t in waiting.values() if not unavailable.isdisjoint(t.needs)]:
        for task in blocked:
            unavailable.add(task.name)
            del waiting[task.name]
        removed += blocked
    return removed


def _exit_text(code: int | None) -> str:
    """Say how a process ended that recorded no failure."""
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


class _environment:  # noqa: N801 (used as a function)
    """A context in which some environment variables have other values."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._values}
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_with(alive: Connection) -> None:
    """Interrupt this process, as by Ctrl-C, once the process of the sweep is gone.

    The connection's other end closes with that process. SIGKILL ends it and its process group,
    but not this process, which has a group of its own.
    """
    alive.poll(None)
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


def _child(run_spec: str, spec: Path, alive: Connection) -> None:
    """Run one task in this process; its output goes to ``log.txt`` in its folder."""
    os.setpgrp()  # a terminal sends Ctrl-C to the sweep only, which forwards it once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    log = os.open(spec.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    module, _, name = run_spec.rpartition(".")
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{started}, process {os.getpid()}", flush=True)  # noqa: T201 (goes to the log)
    try:
        getattr(import_module(module), name)(spec)
    except InputError as error:
        sys.exit(f"widthopt: {error}")
