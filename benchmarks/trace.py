"""Seconds to trace each network to its width variables."""

import statistics
import time
from collections.abc import Iterator

import torch
from harness import Figure, main

from widthopt.networks import TorchvisionNetwork
from widthopt.tracing import trace


NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "vgg11",
    "vgg11_bn",
    "alexnet",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
    "densenet121",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
)
RESOLUTION = 224


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield the median time of several traces of each network, after one that is not timed."""
    for name in NETWORKS:
        network = TorchvisionNetwork(name)
        # RegNet's constructor computes with tensors, so it cannot run where there are no values.
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            model = network.build(depth=1, classes=1000)
        stages = network.stages(model)
        graph = trace(model, RESOLUTION, stages=stages)
        seconds = []
        for _ in range(1 if quick else 5):
            begin = time.perf_counter()
            trace(model, RESOLUTION, stages=stages)
            seconds.append(time.perf_counter() - begin)
        yield Figure(
            f"trace/{name}/{RESOLUTION}",
            statistics.median(seconds),
            f"seconds; {len(graph.free)} width variables, {len(graph.layers)} layers",
            "at most 2",
        )


if __name__ == "__main__":
    main(measure)
