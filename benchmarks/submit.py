"""Submissions to a real SLURM on this machine: seconds, calls of sbatch, seconds to a first step.

The runs do nothing: half of them are searches, half the trainings that wait for one each. A call
of ``sbatch`` costs a busy cluster about a second, so that their number is what matters there.
What a job costs beyond the same run by hand is measured with a short training.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import Figure, main


sys.path.append(str(Path(__file__).parents[1] / "tests" / "slurm"))

from cluster import Cluster

from hydra_plugins.widthopt_launchers import queue
from hydra_plugins.widthopt_launchers.slurm import Slurm
from hydra_plugins.widthopt_launchers.workload import Task
from widthopt.runs.manifest import load_manifests
from widthopt.sweeps.workload import StoredSweep


RESOURCES = {
    "minutes": 5, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1,
    "memory_gb": None,
}  # fmt: skip


class Nothing:
    """A sweep of runs that do nothing; see `Workload`."""

    interruptions = ()
    imports = ()
    name = "nothing"

    def __init__(self, root: Path, count: int) -> None:
        self.root, self.count = root, count
        self._jobs: dict[str, str] = {}

    def begin(self, *, assume_yes: bool, live: Collection[str] = ()) -> None:
        """Nothing is to be said of it."""

    def tasks(self) -> Sequence[Task]:
        """As many searches as trainings."""
        half = range(self.count // 2)
        searches = [Task(f"search-{item}", "a search", (), 1.0) for item in half]
        return searches + [Task(f"train-{item}", "", (f"search-{item}",), 1.0) for item in half]

    def write_spec(self, name: str) -> Path:
        """Its name is all there is of it."""
        spec = self.root / "stages" / name / "spec.json"
        spec.parent.mkdir(parents=True)
        spec.write_text("{}")
        return spec

    def job(self, name: str) -> str:
        """Known while this process lives."""
        return self._jobs.get(name, "")

    def record_job(self, name: str, job: str, **_details: str) -> None:
        """Known while this process lives."""
        self._jobs[name] = job

    def is_done(self, name: str) -> bool:
        """Whether it has run."""
        folder = self.root / "stages" / name
        return folder.is_dir() and not (folder / "spec.json").exists()

    def failure(self, _name: str) -> str:
        """None of them fails."""
        return ""

    def end(self) -> None:
        """Nothing comes out."""


def slurm(run_spec: str = "os.unlink", **options: Any) -> Slurm:
    """The launcher; as it is, all that a run does is to remove its own order."""
    return Slurm(
        run_spec=run_spec, resources=RESOURCES, options=options, gpus_as="none",
        parallelism=64, warn_seconds=60, requeue=True, max_requeues=1, setup=(), python=None,
        packages=("widthopt", "widthopt.conf", "hydra_plugins.widthopt_launchers"), code=(),
    )  # fmt: skip


def calls(root: Path) -> int:
    """How often ``sbatch`` was called: each submission has a folder of its own."""
    return len(list((root / "jobs").iterdir()))


TRAINING = (
    "network=resnet18", "target.width=0.25", "target.resolution=32", "recipe=smoke",
    "methods=[uniform]", "tracking=disabled", "runtime.device=cpu", "runtime.progress=false",
)  # fmt: skip


def overhead(cluster: Cluster, *, turns: int) -> tuple[float, float]:
    """Median seconds from the start of a short training to its result: as a job, and by hand."""
    root = Path(tempfile.mkdtemp())
    command = (sys.executable, "-m", "widthopt")
    later = ("hydra/launcher=slurm", "+hydra.launcher.options.begin=now+3600")
    words = (*command, "-m", *TRAINING, *later, f"root={root}")
    subprocess.run(words, check=True, capture_output=True)  # noqa: S603
    cluster.cancel_all()
    (sweep,) = load_manifests(root)
    (name,) = sweep.own
    workload = StoredSweep(root, sweep)
    launcher = slurm("widthopt.sweeps.worker.run_spec")

    def as_job() -> None:
        workload.begin(assume_yes=True, live=queue.live_jobs())
        launcher.submit(workload)

    def by_hand() -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603
            [*command, "run", name, "--root", root],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    ways: tuple[Callable[[], subprocess.Popen[bytes] | None], ...] = (as_job, by_hand)
    seconds: dict[str, list[float]] = {"as_job": [], "by_hand": []}
    for turn in range(1 + turns):
        for start in ways:
            for path in (root / "stages" / name).iterdir():
                if path.name not in {"spec.json", "fields.json"}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            begin = time.perf_counter()
            process = start()
            while not workload.is_done(name):
                time.sleep(0.01)
            if turn:  # the first one fills caches
                seconds[start.__name__].append(time.perf_counter() - begin)
            if process is not None:
                process.wait()
            cluster.cancel_all()
    shutil.rmtree(root)
    return statistics.median(seconds["as_job"]), statistics.median(seconds["by_hand"])


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Nothing where there can be no cluster."""
    if obstacle := Cluster.obstacle():
        print(f"not measured: {obstacle}")
        return
    with Cluster(settings={"MinJobAge": "60"}) as cluster:
        os.environ.update(cluster.environment)
        for count in (1_000,) if quick else (1_000, 10_000):
            root = Path(tempfile.mkdtemp())
            begin = time.perf_counter()
            slurm(begin="now+3600").submit(Nothing(root, count))
            seconds = time.perf_counter() - begin
            note = f"seconds; {len(queue.live_jobs())} jobs in the queue"
            yield Figure(f"submit/runs/{count}", seconds, note)
            yield Figure(f"sbatch/runs/{count}", calls(root), "calls")
            cluster.cancel_all()
            shutil.rmtree(root)
        root = Path(tempfile.mkdtemp())
        workload = Nothing(root, 2)
        begin = time.perf_counter()
        slurm().submit(workload)
        while not workload.is_done("search-0"):
            time.sleep(0.01)
        yield Figure("first step/run", time.perf_counter() - begin, "seconds from the submission")
        cluster.cancel_all()
        shutil.rmtree(root)
        if not quick:  # as many as the paper has, to their end
            root = Path(tempfile.mkdtemp())
            workload = Nothing(root, 922)
            begin = time.perf_counter()
            replace(slurm(), parallelism=8).submit(workload)
            while queue.live_jobs():
                time.sleep(1)
            done = sum(workload.is_done(task.name) for task in workload.tasks())
            yield Figure("end/runs/922", time.perf_counter() - begin, f"seconds; {done} are done")
            shutil.rmtree(root)
        job, hand = overhead(cluster, turns=1 if quick else 7)
        share = 100 * (job - hand) / 3600
        note = f"seconds; a job {job:.1f}, by hand {hand:.1f}; {share:.2g} % of an hour"
        yield Figure("overhead/run", job - hand, note)


if __name__ == "__main__":
    main(measure)
