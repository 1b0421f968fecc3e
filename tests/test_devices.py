"""Gradients are right however images lie in memory, narrow as the layers may be.

What is wrong there may damage the heap, so that each case has a process of its own.
"""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import RUNTIME
from torch import nn

from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet
from widthopt.setting import Setting
from widthopt.training.devices import to_device


NARROW = (3, 5, 6, 7, 8, 12, 16)
"""Channels read: fewer than a vector of AVX2 (8) or of AVX-512 (16) holds, and as many."""


def check(found, expected, tolerance):
    """Compare a gradient with that in double precision, by a part of its largest entry."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, (found.shape, float(error))


def placed():
    """Convolutions with a stride, of one pixel and of several, as `place` leaves them."""
    last = dataclasses.replace(RUNTIME, memory_format="channels_last")
    for channels in NARROW:
        for kernel, stride in ((1, 2), (1, 3), (1, (2, 1)), (3, 2)):
            model = nn.Conv2d(channels, 12, kernel, stride, kernel // 2)
            exact = copy.deepcopy(model).double()
            _, layout = to_device(model, last)
            to_device(model, last)  # as a search and a training do
            assert len(model._forward_pre_hooks) <= 1  # noqa: SLF001 (nothing else tells)
            for images in torch.randn(3, 16, channels, 16, 16):
                model.zero_grad()
                model(images.contiguous(memory_format=layout)).square().mean().backward()
                exact.zero_grad()
                exact(images.double()).square().mean().backward()
                check(model.weight.grad, exact.weight.grad, 1e-4)


def mixed():
    """Subnets of a ResNet whose shortcuts read a few channels, in mixed formats."""
    network = TorchvisionNetwork("resnet18")
    plan = Blueprint(
        Setting(network=network, classes=5, width=0.25, depth=1, resolution=64, fraction=1.0)
    )
    supernet, exact = (Supernet(plan, enlarge=1.0, seed=0) for _ in range(2))
    exact.model.double()
    supernet.mixed = True
    for count in NARROW:
        channels = dict.fromkeys(supernet.graph.free, count)
        images = torch.randn(8, 3, 64, 64)
        for one, pixels in ((supernet, images), (exact, images.double())):
            one.model.zero_grad(set_to_none=True)
            subnet = one.subnet(channels)
            subnet(pixels).square().mean().backward()
            subnet.collect()
        for stage in (2, 3, 4):
            name = f"layer{stage}.0.downsample.0.weight"
            found, expected = (
                dict(one.model.named_parameters())[name].grad for one in (supernet, exact)
            )
            check(found, expected, 1e-2)


@pytest.mark.parametrize(("threads", "instructions"), [(1, "AVX2"), (2, "DEFAULT")])
@pytest.mark.parametrize("case", ["placed", "mixed"])
def test_gradients_of_narrow_layers_are_right_in_channels_last(case, threads, instructions):
    """oneDNN's are not, of convolutions of one pixel with a stride: they come out otherwise.

    On some processors with AVX-512 only where it is held to older instructions.
    """
    code = f"import torch, test_devices; torch.manual_seed(0); torch.set_num_threads({threads}); "
    code += f"test_devices.{case}()"
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "ONEDNN_MAX_CPU_ISA": instructions,
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
