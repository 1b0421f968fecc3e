"""Hydra launchers that do a sweep's work on this machine: in this process, or in several."""

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from launchers.local import Pool
from launchers.progress import Progress
from launchers.work import Failed, Work


logger = logging.getLogger("widthopt")


def named(path: str) -> Any:
    """What a dotted name names, the last part inside a module."""
    module, _, attribute = path.rpartition(".")
    return getattr(import_module(module), attribute)


class _Launcher(Launcher):
    """Plans all points, does what is left to do, and shows what came out."""

    def __init__(self, *, work: str, perform: str, sure: bool, **options: Any) -> None:
        """Take over the values of ``conf/hydra/launcher``.

        Args:
            work: Dotted name of what makes `Work` of Hydra's loader and the points.
            perform: Dotted name of what does one item, given the path that was frozen.
            sure: Do not ask, however much it is.
            options: Those of one launcher.
        """
        self.work, self.perform, self.sure = work, perform, sure
        self.options = options
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
        self.prepare()
        work: Work = named(self.work)(self.context.config_loader, job_overrides)
        work.begin(sure=self.sure)
        items = work.items()
        with Progress(items) as progress:
            self.execute(work, progress)
        work.end()
        if progress.failed or progress.blocked:
            raise Failed(
                f"{progress.done} of {len(items)} runs are done, {progress.failed} failed and "
                f"{progress.blocked} wait for those; the same command tries them again"
            )
        return []

    def prepare(self) -> None:
        """Check what can be checked before anything is planned or written."""

    def execute(self, work: Work, progress: Progress) -> None:
        """Do all items; the progress is told of each."""
        raise NotImplementedError


class WidthoptInProcessLauncher(_Launcher):
    """One after another in this process: for debugging, and for small sweeps."""

    def execute(self, work: Work, progress: Progress) -> None:
        """See `_Launcher`."""
        perform, lost = named(self.perform), set[str]()
        for item in work.items():
            if not lost.isdisjoint(item.needs):
                lost.add(item.name)
                progress.wait_for_ever(item)
                continue
            progress.start(item)
            try:
                perform(work.freeze(item.name))
                progress.finish(item)
            except Exception as error:
                if isinstance(error, work.interruptions):
                    raise
                lost.add(item.name)
                logger.debug("%s failed", item.what, exc_info=True)
                progress.fail(item, " ".join(str(error).split()) or type(error).__name__)


class WidthoptLocalLauncher(_Launcher):
    """Several at once, each in a process of its own; what fails stops nothing else."""

    def prepare(self) -> None:
        """See `_Launcher`."""
        self.pool = Pool(self.perform, **self.options)

    def execute(self, work: Work, progress: Progress) -> None:
        """See `_Launcher`."""
        self.pool.run(work, progress)
