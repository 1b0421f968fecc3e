"""Hydra launchers that run a sweep: in this process, in several, or on a SLURM cluster."""

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
    """Import an object by its dotted name."""
    module, _, attribute = path.rpartition(".")
    return getattr(import_module(module), attribute)


def save_launch_spec(workload: Workload, launcher: "_Launcher") -> None:
    """Write the launcher's values beside the sweep, for `relaunch`."""
    values = {"launcher": type(launcher).__name__, "workload": launcher.workload}
    values |= {"run_spec": launcher.run_spec, **launcher.options}
    values["home"] = os.getcwd()  # noqa: PTH109 (as the user sees it)
    path = workload.root / "launchers" / f"{workload.name}.json"
    with writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def relaunch(workload: Workload) -> None:
    """Run the remaining tasks with the launcher, and in the folder, of the first launch.

    Args:
        workload: A workload with an absolute root.

    Raises:
        InputError: The launcher's values are missing or damaged, or it cannot start.
        Failed: A task failed.
    """
    path = workload.root / "launchers" / f"{workload.name}.json"
    launchers = (WidthoptInProcessLauncher, WidthoptLocalLauncher, WidthoptSlurmLauncher)
    try:
        values = json.loads(path.read_text("utf-8"))
        launcher_class = {kind.__name__: kind for kind in launchers}[values.pop("launcher")]
        home = Path(values.pop("home"))
        launcher = launcher_class(assume_yes=True, **values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}), but it says how the sweep was started; give "
            "the sweep's own command again"
        ) from error
    with chdir(home if home.is_dir() else "."):  # a cluster gets the code in this folder
        sys.path.append(os.getcwd())  # noqa: PTH109 (as it stands in the path)
        launcher.prepare()
        workload.begin(assume_yes=True, live=launcher.live)
        launcher.carry_out(workload)


class _Launcher(Launcher):
    """Plan all points, run the tasks that are not done, and show the results."""

    def __init__(self, *, workload: str, run_spec: str, assume_yes: bool, **options: Any) -> None:
        """Store the values of ``conf/hydra/launcher``.

        Args:
            workload: Dotted name of the class that makes a `Workload` of Hydra's configuration
                loader and the overrides of each point.
            run_spec: Dotted name of the function that runs one task, given the path of its spec.
            assume_yes: Do not ask for confirmation, however large the sweep is.
            options: The values that only this launcher has.
        """
        self.workload, self.run_spec, self.assume_yes = workload, run_spec, assume_yes
        # Hydra passes mappings and lists as OmegaConf containers.
        self.options: dict[str, Any] = {
            key: OmegaConf.to_container(value) if isinstance(value, Container) else value
            for key, value in options.items()
        }
        self.live: Mapping[str, str] = {}
        self.context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """See Hydra. The task function is not used, since tasks are not the points of the sweep."""
        del task_function, config
        self.context = hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the tasks of these points that are not done.

        Raises:
            InputError: A value is invalid, or a point cannot be computed.
            Failed: A task failed.
        """
        del initial_job_idx
        assert self.context is not None
        if not isinstance(self.assume_yes, bool):
            raise InputError(
                f"hydra.launcher.assume_yes is {self.assume_yes}, but it must be true or false; "
                "correct it"
            )
        self.prepare()
        workload: Workload = import_name(self.workload)(self.context.config_loader, job_overrides)
        workload.begin(assume_yes=self.assume_yes, live=self.live)
        save_launch_spec(workload, self)
        self.carry_out(workload)
        return []

    def carry_out(self, workload: Workload) -> None:
        """Run the remaining tasks of a workload that has begun, and show the results.

        Raises:
            Failed: A task failed.
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
        """Check the options before anything is planned or written."""
        self.check_keys(set())

    def check_keys(self, known: Collection[str]) -> None:
        """Check that the options are exactly these keys.

        Raises:
            InputError: A key is unknown or missing.
        """
        for key in sorted(self.options.keys() ^ known):
            raise InputError(
                f"hydra.launcher.{key} is {self.options.get(key, 'missing')}, but the keys of this "
                f"launcher are {', '.join(sorted(known)) or 'none'}; correct it"
            )

    def execute(self, workload: Workload, progress: Progress) -> None:
        """Run all tasks, and report each to ``progress``."""
        raise NotImplementedError


class WidthoptInProcessLauncher(_Launcher):
    """Run tasks one after another in this process, for debugging and small sweeps."""

    def execute(self, workload: Workload, progress: Progress) -> None:
        """See `_Launcher`."""
        run_spec, unavailable = import_name(self.run_spec), set[str]()
        for task in workload.tasks():
            if not unavailable.isdisjoint(task.needs):
                unavailable.add(task.name)
                progress.block(task)
                continue
            progress.start(task)
            try:
                run_spec(workload.write_spec(task.name))
                progress.finish(task)
            except Exception as error:
                if isinstance(error, workload.interruptions):
                    raise
                unavailable.add(task.name)
                logger.debug("%s failed", task.what, exc_info=True)
                progress.fail(task, " ".join(str(error).split()) or type(error).__name__)


class WidthoptLocalLauncher(_Launcher):
    """Run several tasks at a time, each in its own process. A failure does not stop the others."""

    def prepare(self) -> None:
        """See `_Launcher`."""
        self.check_keys({"max_parallel", "threads"})
        self.pool = Pool(self.run_spec, **self.options)

    def execute(self, workload: Workload, progress: Progress) -> None:
        """See `_Launcher`."""
        self.pool.run(workload, progress)


class WidthoptSlurmLauncher(_Launcher):
    """Submit each task as a SLURM job. The command ends when all jobs are submitted."""

    def prepare(self) -> None:
        """See `_Launcher`."""
        self.check_keys({"wait", *(field.name for field in fields(slurm.Slurm))} - {"run_spec"})
        options = dict(self.options)
        self.wait = options.pop("wait")
        if not isinstance(self.wait, bool):
            raise InputError(
                f"hydra.launcher.wait is {self.wait}, but it must be true or false; correct it"
            )
        self.slurm = slurm.Slurm(run_spec=self.run_spec, **options)
        self.live = queue.live_jobs()

    def carry_out(self, workload: Workload) -> None:
        """Submit the remaining tasks of a workload that has begun.

        Raises:
            Failed: The launcher waits for the jobs, and a task failed.
        """
        left = len(workload.tasks())
        where = f"{workload.name} {root_option(workload.root)}"
        try:
            submitted = self.slurm.submit(workload) if left else 0
            queued = f", {left - submitted} are in the queue already" if left > submitted else ""
            summary = f"{submitted} runs submitted{queued}" if left else "all runs are done"
            logger.info("%s; see: widthopt %s %s", summary, "status" if left else "report", where)
            if self.wait:
                slurm.watch(workload)
        # Around the submission too: Ctrl-C may come right after the line above is printed.
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "stopped; submitted jobs continue; to end them: widthopt cancel " + where
            ) from None
        if self.wait:
            workload.end()
