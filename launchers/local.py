"""Several tasks at once on this machine, each in a process of its own."""

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
"""Time between two looks at the progress where nothing ends."""


class Pool:
    """Does tasks in at most so many processes at once.

    Processes are forked from one that has imported what they need and done nothing else, so
    that each starts within milliseconds and yet knows nothing of those before it.
    """

    def __init__(self, run_spec: str, *, max_parallel: int, threads: int | None) -> None:
        """Prepare.

        Args:
            run_spec: Dotted name of what does one task, given the path that was frozen.
            max_parallel: Processes at once, from 1.
            threads: Threads of each; this machine's processors shared out if None.
        """
        for name, value in (("max_parallel", max_parallel), ("threads", threads)):
            if (name, value) != ("threads", None) and (not isinstance(value, int) or value < 1):
                raise InputError(
                    f"hydra.launcher.{name} is {value}, but at least one must go on at a time; use "
                    "a whole number from 1 up"
                )
        self._run_spec, self._parallel = run_spec, max_parallel
        processors = len(os.sched_getaffinity(0))
        self._threads = threads or max(1, processors // max_parallel)

    def run(self, workload: Workload, progress: Progress) -> None:
        """Do all tasks of a workload, each after what it needs.

        Ctrl-C is passed on to the processes; they save their state, and are waited for.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([self._run_spec.rpartition(".")[0], *workload.imports])
        watched, held = multiprocessing.Pipe(duplex=False)
        # Python would look for its own modules in the current folder first, where a user may
        # have a random.py; the processes get this one's sys.path.
        variables = {"OMP_NUM_THREADS": str(self._threads), "PYTHONSAFEPATH": "1"}
        with watched, held, _environment(variables):
            self._run(workload, progress, context, watched)

    def _run(
        self,
        workload: Workload,
        progress: Progress,
        context: multiprocessing.context.ForkServerContext,
        watched: Connection,
    ) -> None:
        waiting = {task.name: task for task in workload.tasks()}
        running: dict[int, tuple[Task, ForkServerProcess]] = {}
        lost: set[str] = set()
        try:
            while waiting or running:
                for task in _remove_blocked(waiting, lost):
                    progress.wait_for_ever(task)
                for task in self._startable(waiting, running):
                    process = context.Process(
                        target=_child,
                        args=(self._run_spec, workload.write_spec(task.name), watched),
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
                        lost.add(task.name)
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
        """What can be started now, as many as there is room for."""
        going = {task.name for task, _ in running.values()}
        ready = [
            task
            for task in waiting.values()
            if not any(need in waiting or need in going for need in task.needs)
        ]
        return ready[: self._parallel - len(running)]


def _remove_blocked(waiting: dict[str, Task], lost: set[str]) -> list[Task]:
    """What can never be started, taken out of what waits and lost too, with what needs that."""
    result: list[Task] = []
    while found := [task for task in waiting.values() if not lost.isdisjoint(task.needs)]:
        for task in found:
            lost.add(task.name)
            del waiting[task.name]
        result += found
    return result


def _exit_text(code: int | None) -> str:
    """How a process ended that left no word."""
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


class _environment:  # noqa: N801 (used as a function)
    """Set variables, and set them back at the end."""

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


def _end_with(watched: Connection) -> None:
    """End this process as by Ctrl-C once the sweep's is gone, with which the other end closes.

    It may have been killed, and with it only those of its own process group.
    """
    watched.poll(None)
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


def _child(run_spec: str, spec: Path, watched: Connection) -> None:
    """One task in a process of its own; what it prints goes into its folder."""
    os.setpgrp()  # a terminal's Ctrl-C goes to the sweep alone, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    log = os.open(spec.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    module, _, name = run_spec.rpartition(".")
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{started}, process {os.getpid()}", flush=True)  # noqa: T201 (its log)
    try:
        getattr(import_module(module), name)(spec)
    except InputError as error:
        sys.exit(f"widthopt: {error}")
