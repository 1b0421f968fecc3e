"""Hydra launchers that do a sweep's work: in this process, in several, or on a cluster."""

import json
import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import chdir
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import Container, DictConfig, OmegaConf

from hydra_plugins.widthopt_launchers import queue, slurm
from hydra_plugins.widthopt_launchers.local import Pool
from hydra_plugins.widthopt_launchers.progress import Progress
from hydra_plugins.widthopt_launchers.workload import Failed, Workload
from widthopt.errors import InputError
from widthopt.files import write_atomically, writing
from widthopt.runs.states import root_option


logger = logging.getLogger("widthopt")


def import_name(path: str) -> Any:
    """What a dotted name names, the last part inside a module."""
    module, _, attribute = path.rpartition(".")
    return getattr(import_module(module), attribute)


def save_launch_spec(workload: Workload, launcher: "_Launcher") -> None:
    """Write down beside a sweep how it was started, for `relaunch`."""
    values = {"launcher": type(launcher).__name__, "workload": launcher.workload}
    values |= {"run_spec": launcher.run_spec, **launcher.options}
    values["home"] = os.getcwd()  # noqa: PTH109 (as the user sees it)
    path = workload.root / "launchers" / f"{workload.name}.json"
    with writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def relaunch(workload: Workload) -> None:
    """Do what is left of a workload as it was started before, and in the folder where that was.

    Args:
        workload: It is kept at an absolute path.

    Raises:
        InputError: How that was is not known, or it cannot be done.
        Failed: Some of it was not done.
    """
    path = workload.root / "launchers" / f"{workload.name}.json"
    kinds = (WidthoptInProcessLauncher, WidthoptLocalLauncher, WidthoptSlurmLauncher)
    try:
        values = json.loads(path.read_text("utf-8"))
        kind = {one.__name__: one for one in kinds}[values.pop("launcher")]
        home = Path(values.pop("home"))
        launcher = kind(assume_yes=True, **values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not say how the sweep was started ({error}), but that is needed; give "
            "the sweep's own command again"
        ) from error
    with chdir(home if home.is_dir() else "."):  # the code is there that a cluster gets
        sys.path.append(os.getcwd())  # noqa: PTH109 (as it stands in the path)
        launcher.prepare()
        workload.begin(assume_yes=True, live=launcher.live)
        launcher.carry_out(workload)


class _Launcher(Launcher):
    """Plans all points, does what is left to do, and shows what came out."""

    def __init__(self, *, workload: str, run_spec: str, assume_yes: bool, **options: Any) -> None:
        """Take over the values of ``conf/hydra/launcher``.

        Args:
            workload: Dotted name of what makes `Workload` of Hydra's loader and the points.
            run_spec: Dotted name of what does one task, given the path that was frozen.
            assume_yes: Do not ask, however much it is.
            options: Those of one launcher.
        """
        self.workload, self.run_spec, self.assume_yes = workload, run_spec, assume_yes
        # Plain data: Hydra hands over its own kinds of tables and lists.
        self.options: dict[str, Any] = {
            key: OmegaConf.to_container(value) if isinstance(value, Container) else value
            for key, value in options.items()
        }
        self.live: Mapping[str, str] = {}
        self.context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """See Hydra; the task function is not used, for the units of work are not the points."""
        del task_function, config
        self.context = hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Do what is left of these points.

        Raises:
            Failed: Some of it was not done.
        """
        del initial_job_idx
        assert self.context is not None
        if not isinstance(self.assume_yes, bool):
            raise InputError(
                f"hydra.launcher.assume_yes is {self.assume_yes}, but it must be true or false; correct it"
            )
        self.prepare()
        workload: Workload = import_name(self.workload)(self.context.config_loader, job_overrides)
        workload.begin(assume_yes=self.assume_yes, live=self.live)
        save_launch_spec(workload, self)
        self.carry_out(workload)
        return []

    def carry_out(self, workload: Workload) -> None:
        """Do what is left of a workload that was begun.

        Raises:
            Failed: Some of it was not done.
        """
        tasks = workload.tasks()
        with Progress(tasks) as progress:
            self.execute(workload, progress)
        workload.end()
        if progress.failed or progress.blocked:
            raise Failed(
                f"{progress.done} of {len(tasks)} runs are done, {progress.failed} failed and "
                f"{progress.blocked} wait for those; the same command tries them again"
            )

    def prepare(self) -> None:
        """Check what can be checked before anything is planned or written."""
        self.check_keys(set())

    def check_keys(self, known: Collection[str]) -> None:
        """Check that just these keys were given, beside those that all launchers have.

        Raises:
            InputError: One is unknown, or missing.
        """
        for key in sorted(self.options.keys() ^ known):
            raise InputError(
                f"hydra.launcher.{key} is {self.options.get(key, 'missing')}, but the keys of this "
                f"launcher are {', '.join(sorted(known)) or 'none'}; correct it"
            )

    def execute(self, workload: Workload, progress: Progress) -> None:
        """Do all tasks; the progress is told of each."""
        raise NotImplementedError


class WidthoptInProcessLauncher(_Launcher):
    """One after another in this process: for debugging, and for small sweeps."""

    def execute(self, workload: Workload, progress: Progress) -> None:
        """See `_Launcher`."""
        run_spec, lost = import_name(self.run_spec), set[str]()
        for task in workload.tasks():
            if not lost.isdisjoint(task.needs):
                lost.add(task.name)
                progress.wait_for_ever(task)
                continue
            progress.start(task)
            try:
                run_spec(workload.write_spec(task.name))
                progress.finish(task)
            except Exception as error:
                if isinstance(error, workload.interruptions):
                    raise
                lost.add(task.name)
                logger.debug("%s failed", task.what, exc_info=True)
                progress.fail(task, " ".join(str(error).split()) or type(error).__name__)


class WidthoptLocalLauncher(_Launcher):
    """Several at once, each in a process of its own; what fails stops nothing else."""

    def prepare(self) -> None:
        """See `_Launcher`."""
        self.check_keys({"max_parallel", "threads"})
        self.pool = Pool(self.run_spec, **self.options)

    def execute(self, workload: Workload, progress: Progress) -> None:
        """See `_Launcher`."""
        self.pool.run(workload, progress)


class WidthoptSlurmLauncher(_Launcher):
    """Each run a job of a SLURM cluster; the command ends when all are submitted."""

    def prepare(self) -> None:
        """See `_Launcher`."""
        self.check_keys({"wait", *(one.name for one in fields(slurm.Slurm))} - {"run_spec"})
        wanted = dict(self.options)
        self.stay = wanted.pop("wait")
        if not isinstance(self.stay, bool):
            raise InputError(
                f"hydra.launcher.wait is {self.stay}, but it is true or false; correct it"
            )
        self.slurm = slurm.Slurm(run_spec=self.run_spec, **wanted)
        self.live = queue.live_jobs()

    def carry_out(self, workload: Workload) -> None:
        """Submit what is missing of some work that was begun, and say how to watch it.

        Raises:
            Failed: The command was to wait, and some of it was not done.
        """
        left = len(workload.tasks())
        where = f"{workload.name} {root_option(workload.root)}"
        try:
            submitted = self.slurm.submit(workload) if left else 0
            queued = f", {left - submitted} are in the queue already" if left > submitted else ""
            said = f"{submitted} runs submitted{queued}" if left else "all runs are done"
            logger.info("%s; see: widthopt %s %s", said, "status" if left else "report", where)
            if self.stay:
                slurm.watch(workload)
        # Here too, as a user who has read that the runs are submitted may be faster than the wait.
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "stopped; what was submitted goes on, and this ends it: widthopt cancel " + where
            ) from None
        if self.stay:
            workload.end()
