"""Gradients of narrow layers are correct in every memory format.

A fault may corrupt the heap, so each case runs in a separate process.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import make_runtime, make_setting
from torch import nn

from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet
from widthopt.training.devices import to_device


NARROW = (3, 5, 6, 7, 8, 12, 16)
"""Input channels: fewer than a vector of AVX2 (8) or AVX-512 (16) holds, and as many."""


def check(gradient, expected, tolerance):
    """Compare a gradient with that in double precision, relative to its largest entry."""
    error = (gradient - expected).abs().max() / expected.abs().max()
    assert error < tolerance, (gradient.shape, float(error))


def check_moved():
    """Check strided convolutions, 1x1 and larger, after `to_device`."""
    last = make_runtime(memory_format="channels_last")
    for channels in NARROW:
        for kernel, stride in ((1, 2), (1, 3), (1, (2, 1)), (3, 2)):
            model = nn.Conv2d(channels, 12, kernel, stride, kernel // 2)
            exact = copy.deepcopy(model).double()
            _, layout = to_device(model, last)
            to_device(model, last)  # twice, as a search and its training do
            assert len(model._forward_pre_hooks) <= 1  # noqa: SLF001 (no public API)
            for images in torch.randn(3, 16, channels, 16, 16):
                model.zero_grad()
                model(images.contiguous(memory_format=layout)).square().mean().backward()
                exact.zero_grad()
                exact(images.double()).square().mean().backward()
                check(model.weight.grad, exact.weight.grad, 1e-4)


def check_mixed():
    """Check subnets of a ResNet whose shortcuts read few channels, in mixed formats."""
    plan = Blueprint(make_setting("resnet18", classes=5, width=0.25, resolution=64))
    supernet, exact = (Supernet(plan, enlarge=1.0, seed=0) for _ in range(2))
    exact.model.double()
    supernet.mixed = True
    for count in NARROW:
        channels = dict.fromkeys(supernet.graph.free, count)
        images = torch.randn(8, 3, 64, 64)
        for network, pixels in ((supernet, images), (exact, images.double())):
            network.model.zero_grad(set_to_none=True)
            subnet = network.subnet(channels)
            subnet(pixels).square().mean().backward()
            subnet.collect()
        for stage in (2, 3, 4):
            name = f"layer{stage}.0.downsample.0.weight"
            gradient, expected = (
                network.model.get_parameter(name).grad for network in (supernet, exact)
            )
            check(gradient, expected, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "instructions"), [(1, "AVX2"), (2, "DEFAULT")])
@pytest.mark.parametrize("case", ["check_moved", "check_mixed"])
def test_gradients_of_narrow_layers_are_correct_in_channels_last(case, threads, instructions):
    """oneDNN's gradients of strided 1x1 convolutions are wrong in channels last.

    On some processors with AVX-512 only if oneDNN is limited to older instructions.
    """
    code = f"import torch, test_devices; torch.manual_seed(0); torch.set_num_threads({threads}); "
    code += f"test_devices.{case}()"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(  # noqa: S603 (a fixed command)
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "ONEDNN_MAX_CPU_ISA": instructions,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
