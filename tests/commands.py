"""The command as tests start it: in a process and a folder of its own, with a small network."""

import os
import subprocess
import sys


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "118"}
TINY = (
    "network=custom",
    "network.factory=my_network.MyNetwork",
    "recipe=smoke",
    "algorithm=morphnet",
    "algorithm.strength=5",
    "target.resolution=12",
    "projection.width=0.5",
    "runtime.device=cpu",
    "tracking=disabled",
)
"""A run of a few seconds."""

NETWORK = '''
import torch
from torch import nn


class Layer(nn.Sequential):
    def __init__(self, inputs, outputs, kernel, stride):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class MyNetwork(nn.Module):
    """A residual sum, and two branches side by side."""

    def __init__(self, num_classes, width=16):
        super().__init__()
        self.stem = Layer(3, width, 3, 2)
        self.residual = nn.Sequential(Layer(width, 24, 1, 1), Layer(24, width, 3, 1))
        self.wide = Layer(width, 20, 3, 2)
        self.narrow = Layer(width, 12, 1, 2)
        self.head = nn.Linear(32, num_classes)

    def forward(self, images):
        stem = self.stem(images)
        both = stem + self.residual(stem)
        side = torch.cat([self.wide(both), self.narrow(both)], dim=1)
        return self.head(side.mean((2, 3)))
'''


def prepare(folder, experiment):
    """Put the network into a folder, and an experiment of its own (``--config-dir conf``)."""
    (folder / "my_network.py").write_text(NETWORK)
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(experiment)


def command(*words):
    return [sys.executable, "-m", "widthopt", *words]


def widthopt(*words, folder):
    return subprocess.run(  # noqa: S603 (our own words)
        command(*words),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def one_line(done, code):
    """The one line of a command that ended with this code."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("widthopt: ")
    return lines[0].removeprefix("widthopt: ")
