"""Peak memory of a search step relative to plain training of the enlarged network; 1 is equal.

Each is measured in its own process: the peak of resident memory during three steps, minus the
memory before the network was built. In the first measurement the C library returns every large
block to the system when it is freed, so the figure is the memory in use. In the second (``heap``)
it uses its default and keeps blocks of passes at other widths, so the figure varies.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from harness import Figure, main
from search_step import RUNTIME, looping, searching

from widthopt.config.compose import compose
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import enlarge_channels
from widthopt.setting import Setting


STEPS = 1000
CLASSES = 100
HELD = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""The environment in which the C library maps blocks of 64 KiB and more one by one."""


def peak_bytes(what: str, network: str, resolution: int, batch: int) -> int:
    """Bytes that three steps add to the peak of this process."""
    request = compose([f"algorithm={'dmcp' if what == 'plain' else what}", "recipe=paper"])
    blueprint = Blueprint(Setting(TorchvisionNetwork(network), CLASSES, 1.0, 1, resolution, 1.0))
    images = torch.randn(batch, 3, resolution, resolution)
    labels = torch.randint(CLASSES, (batch,))
    before = _peak()
    if what == "plain":
        channels = enlarge_channels(blueprint.graph, 1.5)  # as their configuration has it
        loop = looping(blueprint.build(channels, seed=0), request.recipe, RUNTIME, None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            loop, _, _ = searching(request.algorithm, blueprint, request.recipe, Path(folder))
    for turn in range(3):
        loop.step(images, labels, STEPS // 2 + turn)
    return _peak() - before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield the ratio for each algorithm and network."""
    batch = 64
    networks = ("resnet18",) if quick else ("resnet18", "mobilenet_v2")
    resolutions = (32,) if quick else (32, 64)
    heaps: dict[str, dict[str, str]] = {"": HELD} if quick else {"": HELD, "/heap": {}}
    for network, resolution, (suffix, environment) in product(networks, resolutions, heaps.items()):
        peaks = {}
        for what in ("plain", "autoslim", "dmcp"):
            done = subprocess.run(  # noqa: S603 (this very file)
                [
                    sys.executable,
                    __file__,
                    "--case",
                    json.dumps([what, network, resolution, batch]),
                ],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                check=True,
            )
            peaks[what] = int(done.stdout.split()[-1])
        for what in ("autoslim", "dmcp"):
            yield Figure(
                f"{what}/{network}/{resolution}{suffix}",
                peaks[what] / peaks["plain"],
                f"{peaks[what] / 1e6:.0f} MB, plain {peaks['plain'] / 1e6:.0f} MB; {batch} images",
                "" if suffix else "at most 1.3",
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--case")
    options, _ = parser.parse_known_args()
    if options.case:
        print(peak_bytes(*json.loads(options.case)))
    else:
        main(measure)
