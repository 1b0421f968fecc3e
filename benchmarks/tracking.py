"""What tracking costs: of a step, in per cent, and of a run, in seconds; offline, as by default.

The cost of a row is the processor time of the whole process, W&B's thread included, over many
rows; a step's is that of its training. Start and end are those of a fresh process, which loads
W&B.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from harness import Figure, main
from train_step import CLASSES, RECIPE, RUNTIME

from widthopt.config.compose import compose
from widthopt.runs.point import SizedRequest
from widthopt.tracking import Tracker
from widthopt.training.loop import Loop


# isort: split
import torchvision


POINT = SizedRequest(compose([]), images=False)
ABOUT = POINT.about("search", "transfer", 0, POINT.search_entry("transfer", 0))
ROW = {f"loss_{name}": 0.5 for name in range(12)}
"""As many numbers as a search has in a row."""


def row_seconds(folder: Path, rows: int) -> float:
    """Processor time of a row."""
    tracker = Tracker(compose([]).tracking, ABOUT, folder / "stages" / "search-x")
    tracker.row(0, ROW)
    before = time.process_time()
    for step in range(1, rows + 1):
        tracker.row(step, ROW)
    tracker.close()
    return (time.process_time() - before) / rows


def step_seconds(steps: int) -> float:
    """Processor time of a step of ResNet18 on images of 32 pixels, on one thread."""
    torch.set_num_threads(1)
    model = torchvision.models.get_model("resnet18", weights=None, num_classes=CLASSES)
    loop = Loop(model, recipe=RECIPE, steps_per_epoch=1000, epochs=100, seed=0, runtime=RUNTIME)
    images = torch.randn(RECIPE.batch_size, 3, 32, 32)
    labels = torch.randint(CLASSES, (RECIPE.batch_size,))
    seconds = []
    for step in range(steps):
        before = time.perf_counter()
        loop.step(images, labels, step)
        seconds.append(time.perf_counter() - before)
    return median(seconds)


def run_seconds(folder: Path, mode: str) -> float:
    """What a run takes for its begin and its end, in a process of its own."""
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from tracking import ABOUT, Tracker, compose\n"
        f"tracking = compose(['tracking={mode}']).tracking\n"
        "before = time.perf_counter()\n"
        f"tracker = Tracker(tracking, ABOUT, Path({str(folder)!r}) / 'stages' / 'search-x')\n"
        "tracker.resume(0)\n"
        "tracker.row(1, {'loss': 1.0})\n"
        "tracker.widths({'conv': 3}, {'conv': 1.0})\n"
        "tracker.close()\n"
        "print(time.perf_counter() - before)\n"
    )
    done = subprocess.run(  # noqa: S603 (our own words)
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield the cost of a row relative to its steps, and the seconds of a run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step, row = step_seconds(5 if quick else 20), row_seconds(folder, 500)
        interval = compose([]).tracking.log_every_steps
        yield Figure(
            "tracking/row/resnet18/32",
            100 * row / (interval * step),
            f"% of {interval} steps: a row {1000 * row:.2f} ms, a step {1000 * step:.0f} ms",
            "at most 1",
        )
        for mode in ("offline", "disabled"):
            seconds = [run_seconds(folder / f"{mode}{i}", mode) for i in range(2 if quick else 5)]
            yield Figure(
                f"tracking/run/{mode}",
                median(seconds),
                f"s to begin and end; {len(seconds)} runs",
                "at most 2",
            )


if __name__ == "__main__":
    main(measure)
