"""A person on the login node of a test's cluster: a folder, a shell, and what they see of runs."""

import json
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

from commands import ENVIRONMENT, NETWORK, command


BASE = (
    "network=custom", "network.factory=my_network.MyNetwork", "recipe=smoke",
    "algorithm=morphnet", "algorithm.strength=5", "target.resolution=12", "runtime.device=cpu",
    "methods=[transfer]", "runtime.backend=slice", "runtime.memory_format=contiguous",
    "tracking=disabled",
)  # fmt: skip
SWEEP = ("-m", *BASE, "hydra/launcher=slurm", "hydra.launcher.resources.cpus_per_task=1")
ONE = (*SWEEP, "projection.width=0.5", "seeds=[0]")
"""One search and one training."""
EPOCHS = 60
LONG = f"recipe.search_epochs={EPOCHS}"
"""A search that is long enough to be disturbed while it goes `Folder.slowly`; else it is short."""
PATIENCE_SECONDS = 240

SLOWLY = """

import pathlib
import time


class Slowly(nn.ReLU):
    def forward(self, images):
        real = self.training and images.device.type != "meta"
        if real and pathlib.Path("slowly").exists():
            time.sleep(0.1)
        return super().forward(images)


Slowly.__module__ = "torch.nn"  # so that it is not traced into


class MyNetwork(MyNetwork):
    def __init__(self, num_classes, width=16):
        super().__init__(num_classes, width)
        self.stem[2] = Slowly()
"""


class Folder:
    """A person's folder and shell on the cluster's login node."""

    def __init__(self, path, cluster):
        self.path, self.cluster = path, cluster
        self.environment = {**ENVIRONMENT, **cluster.environment}
        self.network = path / "my_network.py"
        self.network.write_text(NETWORK + SLOWLY)

    @contextmanager
    def slowly(self):
        """Meanwhile each step of a training takes longer, but no more of a processor."""
        (self.path / "slowly").touch()
        yield
        (self.path / "slowly").unlink()

    def start(self, *words, **more):
        return subprocess.Popen(  # noqa: S603
            command(*words), cwd=self.path, env={**self.environment, **more}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def widthopt(self, *words, **more):
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def send(self, *words, submitted=None):
        """Submit; how many runs that were."""
        done = self.widthopt(*words)
        assert done.returncode == 0, done.stderr
        count = int(done.stderr.splitlines()[-1].split(" ", 1)[0].replace("all", "0"))
        assert submitted in (None, count), done.stderr
        return count

    def rows(self):
        done = self.widthopt("status", "--json")
        assert done.returncode == 0, done.stderr
        return [row for table in json.loads(done.stdout) for row in table["runs"]]

    def states(self):
        return {(row["kind"], row["state"]) for row in self.rows()}

    def row(self, kind):
        (row,) = [row for row in self.rows() if row["kind"] == kind]
        return row

    def queue(self):
        text = self.cluster.run("squeue", "-h", "-r", "-o", "%i %T")
        return dict(line.split() for line in text.splitlines())

    def until(self, fits):
        """Wait until something holds; what it was."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not (found := fits()):
            assert time.monotonic() < until, (self.queue(), self.logs())
            time.sleep(0.3)
        return found

    def until_over(self):
        self.until(lambda: not self.queue())

    def until_running(self, kind="search", epochs=3):
        """Wait until a run of this kind trains; its row."""
        row = self.row(kind)
        log = self.path / "runs" / "stages" / row["name"] / "log.txt"
        self.until(lambda: log.exists() and log.read_text().count(": epoch ") >= epochs)
        return row

    def until_started(self, row, times):
        """Wait until a run has been started so many times."""
        self.until(lambda: len(self.attempts(row["name"])) == times)

    def logs(self):
        return {
            str(path): path.read_text()[-2000:] for path in self.path.glob("runs/stages/*/log*.txt")
        }

    def attempts(self, name):
        path = self.path / "runs" / "stages" / name / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def results(self, root="runs"):
        """What each run found, without the seconds it took."""
        found = {}
        for path in self.path.glob(f"{root}/stages/*/result.json"):
            found[path.parent.name] = _timeless(json.loads(path.read_text())["result"])
        return found


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if "seconds" not in key}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def results_without_cluster(folder, *words):
    """The results of the same points, undisturbed and without a cluster."""
    words = [word for word in words if not word.startswith("hydra")]
    done = folder.widthopt(*words, "root=alone")
    assert done.returncode == 0, done.stderr
    return folder.results("alone")


def is_complete(folder, *words):
    """All is done, nothing was lost, and it is what comes out undisturbed."""
    assert {row["state"] for row in folder.rows()} == {"done"}
    assert folder.results() == results_without_cluster(folder, *words)
    return True


def preempt(folder, _row):
    """Give all GPUs of the cluster to a job of higher priority for a moment."""
    folder.cluster.run(
        "sbatch", "-p", "high", f"-N{len(folder.cluster.nodes)}", "--gpus-per-node=8",
        "--output=/dev/null", "--wrap", "sleep 2",
    )  # fmt: skip


def start_patched(folder, patch, *words):
    """The command with something in it replaced, so that it can be met at one instant."""
    script = f"{textwrap.dedent(patch)}\nimport sys, widthopt.cli\nwidthopt.cli.main()"
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", script, *words], cwd=folder.path, env=folder.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_patched(folder, patch, *words):
    """The same to its end."""
    process = start_patched(folder, patch, *words)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
