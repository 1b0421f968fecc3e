"""The MACs of a graph as a polynomial with tensor coefficients."""

from typing import NamedTuple

import torch
from torch import Tensor

from widthopt.widthgraph import WidthGraph


class Polynomial(NamedTuple):
    """MACs = constant + slopes . n + n . curvature n / 2 + squares . n^2, in float64.

    ``n`` are the class counts of the free width variables, in forward order. ``squares`` has the
    products of a variable with itself, because expectations need them separately. ``curvature``
    is symmetric with a zero diagonal.
    """

    constant: float
    slopes: Tensor
    curvature: Tensor
    squares: Tensor

    @classmethod
    def of(cls, graph: WidthGraph) -> "Polynomial":
        """Return `WidthGraph.quadratic` as tensors on the CPU."""
        rows = [index for index, variable in enumerate(graph.variables) if variable.free]
        row = {index: place for place, index in enumerate(rows)}
        slopes = torch.zeros(len(row), dtype=torch.float64)
        curvature = torch.zeros(len(row), len(row), dtype=torch.float64)
        squares = torch.zeros(len(row), dtype=torch.float64)
        for index, factor in graph.quadratic.linear.items():
            slopes[row[index]] += factor
        for (first, second), factor in graph.quadratic.pairs.items():
            if first == second:
                squares[row[first]] += factor
            else:
                curvature[row[first], row[second]] += factor
                curvature[row[second], row[first]] += factor
        return cls(float(graph.quadratic.constant), slopes, curvature, squares)
