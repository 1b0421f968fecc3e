"""Speed of greedy slimming relative to one forward pass for each candidate.

Both engines make the same first moves from the same supernet, which is asserted. The naive engine
runs once with the default memory format, and once with that of the fast engine, which shows the
part of the gain that is due to fewer MACs.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness import Figure, main

from widthopt.algorithms.greedy import Engine, Slimmed, slim
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet
from widthopt.setting import Runtime, Setting
from widthopt.training.devices import resolve_device


RUNTIME = Runtime(
    device="auto",
    workers=0,
    precision="float32",
    memory_format="auto",
    backend="slice",
    progress=False,
)
LAST = replace(RUNTIME, memory_format="channels_last")
CLASSES = 100
BINS = 10


class Comparison:
    """The first moves in one network, by either engine."""

    def __init__(self, name: str, *, resolution: int, images: int, moves: int) -> None:
        setting = Setting(
            network=TorchvisionNetwork(name),
            classes=CLASSES,
            width=0.5,
            depth=1,
            resolution=resolution,
            fraction=1.0,
        )
        device = resolve_device(RUNTIME)
        self.supernet = Supernet(Blueprint(setting), enlarge=1.5, seed=0)
        self.supernet.model.to(device)
        self.grids = {
            name: sorted(
                {max(1, round(k * free.classes / BINS)) * free.unit for k in range(1, BINS + 1)}
            )
            for name, free in self.supernet.graph.free.items()
        }
        draws = torch.Generator().manual_seed(0)
        pictures = torch.randn(images, 3, resolution, resolution, generator=draws).to(device)
        with torch.no_grad():  # half of the labels are its predictions, so that errors differ
            labels = self.supernet.full(pictures).argmax(1)
        unknown = torch.randint(CLASSES, (images,), generator=draws).to(device)
        known = torch.randint(2, (images,), generator=draws).to(device).bool()
        self.chunks = [(pictures, torch.where(known, labels, unknown))]
        self.budget_macs = self._after(moves)

    def _after(self, moves: int) -> int:
        """Return the MACs after some moves. This also warms up."""
        with TemporaryDirectory() as folder:
            macs: int = self.supernet.graph.macs()
            for _ in range(moves):
                macs = (
                    self.run("fast", budget_macs=macs - 1, log=Path(folder, "log")).moves[-1].macs
                )
        return macs

    def run(
        self,
        engine: Engine,
        runtime: Runtime = RUNTIME,
        *,
        budget_macs: int | None = None,
        log: Path | None = None,
    ) -> Slimmed:
        """Run an engine."""
        return slim(
            self.supernet,
            self.grids,
            self.chunks,
            budgets_macs=[budget_macs or self.budget_macs],
            runtime=runtime,
            log=log,
            engine=engine,
        )


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield the seconds of the naive engine divided by those of the fast one."""
    resolution, images, moves = 64, 256, 1 if quick else 4
    for name in ("resnet18",) if quick else ("mobilenet_v2", "resnet18"):
        race = Comparison(name, resolution=resolution, images=images, moves=moves)
        fast = race.run("fast")
        for label, runtime in (("", RUNTIME), ("/channels_last", LAST)):
            naive = race.run("naive", runtime)
            assert naive.moves == fast.moves, "the engines make different moves"
            yield Figure(
                f"greedy/{name}/{resolution}{label}",
                naive.seconds / fast.seconds,
                f"{fast.seconds:.2f} s, naive {naive.seconds:.2f} s; "
                f"{len(fast.moves)} moves, {images} images; "
                f"{naive.macs / fast.macs:.2f} times fewer MACs",
                "at least 3",
            )


if __name__ == "__main__":
    main(measure)
