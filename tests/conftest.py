import functools
import math
import signal

import hypothesis
import pytest
import torch
from torch import nn

from widthopt.networks import TorchvisionNetwork
from widthopt.tracing import trace


# A shell without job control starts background processes with Ctrl-C ignored. Tests that send it,
# and the processes that they start, need the handler of a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
hypothesis.settings.register_profile("widthopt", derandomize=True, deadline=None)
hypothesis.settings.load_profile("widthopt")


@functools.cache
def _traced(name, resolution, depth, classes):
    network = TorchvisionNetwork(name)
    # RegNet's constructor computes with tensors, so it cannot run on the meta device.
    with torch.device("cpu" if "regnet" in name else "meta"):
        model = network.build(depth=depth, classes=classes)
    return model, trace(model, resolution, stages=network.stages(model))


@pytest.fixture(scope="session")
def traced():
    """Return a torchvision network without weights and its graph; both are cached."""

    def get(name, resolution=224, *, depth=1, classes=1000):
        return _traced(name, resolution, depth, classes)

    return get


@pytest.fixture(scope="session")
def counted():
    """Count the MACs of a module by hooks on its layers: every weight at every position."""

    def count(model, resolution):
        total = 0

        def hook(module, inputs, output):
            nonlocal total
            if isinstance(module, nn.Linear):
                positions = math.prod(output.shape[:-1])
            else:
                transposed = module.transposed
                positions = math.prod((inputs[0] if transposed else output).shape[2:])
            total += positions * module.weight.numel()

        handles = [
            module.register_forward_hook(hook)
            for module in model.modules()
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))  # noqa: SLF001
        ]
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        with torch.no_grad():
            model(torch.zeros(1, 3, resolution, resolution, device=device))
        for handle in handles:
            handle.remove()
        model.train(training)
        return total

    return count
